"""The report of an audit as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from marginclip.files import write_whole
from marginclip.maxmargin import MaximumMargins
from marginclip.reporting.style import AFTER, BEFORE, BOUND, CLEAN, TRIGGERED, new_figure, tidy
from marginclip.service.verdict import stronger

if TYPE_CHECKING:
    from marginclip.service.audit import Audit

SHOWN_CLASSES = 40
PAGE = Path(__file__).with_suffix(".html")


def write_page(audit: Audit, path: Path) -> Path:
    """Write the page. Everything that comes from outside, such as names of classes, is escaped."""
    charts = [
        (
            "Reach of every class",
            "Mean margin, in logits, that images of other classes reach by a few small steps towards it. In 19 of 20 draws from "
            "the fitted null the largest class lies under the dashed line.",
            _chart(_bars(audit.reached, audit.classes)),
        ),
        (
            "Reach of every class by a warp",
            "By how much, in logits, one small smooth warp of all images raises the mean margin of the class on images of others.",
            _chart(_bars(audit.warped, audit.classes)),
        ),
        (
            "Maximum margin of every class (MM-BD)", "The largest margin, in logits, that was found from random images.",
            _chart(_bars(audit.margins, audit.classes)),
        ),
        ("Confidence", "How often the model is right by how sure it is.", _chart(_reliability(audit.tensors["reliability"].numpy()))),
        (
            "Activations", "The largest activation of each map on the clean images, in order, and the bound that MMAC learned for it.",
            _chart(_activations(audit)),
        ),
    ]  # fmt: skip
    suspect = audit.classes[stronger(audit.reached, audit.warped).suspect]
    galleries = [(f'Clean images of "{suspect}"', "For comparison.", _pictures(audit.tensors["examples"], ""))]
    if "images" in audit.tensors:
        shown = audit.tensors["images"][:SHOWN_CLASSES]
        names = audit.classes[: len(shown)]
        text = "What gradient ascent made of a random image. A trigger can be visible here." + (
            f" The first {SHOWN_CLASSES} classes." if len(audit.classes) > SHOWN_CLASSES else ""
        )
        galleries.append(("Input of largest margin of every class", text, list(zip(names, map(_picture, shown), strict=True))))
    if "flagged_images" in audit.tensors:
        found = audit.tensors["flagged_images"]
        galleries.append(
            ("Flagged images", "Of those to look at, the ones whose margin the bounds lower most.", _pictures(found, ""))
        )
    page = Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8")).render(
        verdict=audit.verdict, charts=charts, galleries=galleries, seconds=audit.seconds,
        colour={"poisoned": TRIGGERED, "imbalanced": BEFORE, "nothing": AFTER}[audit.verdict.kind],
    )  # fmt: skip
    return write_whole(path, lambda partial: _write(partial, page))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _bars(found: MaximumMargins, classes: tuple[str, ...]) -> Figure:
    figure = new_figure(9, 3.4, "")
    axes = figure.subplots()
    order = found.statistics.argsort(descending=True)[:SHOWN_CLASSES]
    colours = [TRIGGERED if int(label) == found.suspect and found.detected else CLEAN for label in order]
    axes.bar(range(len(order)), found.statistics[order].numpy(), color=colours)
    limit = threshold_of(found, len(classes))
    axes.axhline(limit, color=BOUND, linestyle="--", linewidth=1)
    names = [classes[int(label)][:18].replace("$", r"\$") for label in order]
    axes.set_xticks(range(len(order)), names, rotation=60, ha="right", fontsize=8)
    tidy(axes, title="", xlabel="", ylabel="logits")
    return figure


def threshold_of(found: MaximumMargins, count: int, level: float = 0.05) -> float:
    """The statistic that the largest of ``count`` draws from the fitted null exceeds with the chance ``level``."""
    import torch

    low, high = 0.0, float(found.statistics.max().clamp_min(1e-6)) * 10 + found.shape * found.scale * 10
    for _ in range(60):
        middle = (low + high) / 2
        beyond = torch.special.gammaincc(
            torch.tensor(found.shape, dtype=torch.float64), torch.tensor(middle / found.scale, dtype=torch.float64)
        )
        chance = float(-torch.expm1(count * torch.log1p(-beyond)))
        low, high = (middle, high) if chance > level else (low, middle)
    return high


def _reliability(bins: np.ndarray) -> Figure:
    figure = new_figure(5, 3.4, "")
    axes = figure.subplots()
    filled = bins[:, 0] > 0
    width = 100 / len(bins)
    axes.bar((np.arange(len(bins)) + 0.5)[filled] * width, 100 * bins[filled, 2], width, color=CLEAN, edgecolor="white")
    axes.plot([0, 100], [0, 100], "--", color=BOUND, linewidth=1)
    tidy(axes, title="", xlabel="confidence (%)", ylabel="accuracy (%)")
    return figure


def _activations(audit: Audit) -> Figure:
    figure = new_figure(9, 3.4, "")
    names = list(audit.sites)
    chosen = [names[place] for place in sorted({round(part * (len(names) - 1) / 3) for part in range(4)})]
    for axes, name in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        largest, upper = (value.numpy() for value in audit.sites[name])
        order = np.argsort(largest)
        axes.plot(largest[order], color=CLEAN, label="clean maximum")
        axes.plot(upper[order], color=BOUND, linewidth=1, label="bound")
        tidy(axes, title=name[-24:], xlabel="map", ylabel="")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _chart(figure: Figure) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return _data(buffer.getvalue())


def _pictures(images: Tensor, caption: str) -> list[tuple[str, str]]:
    return [(caption, _picture(image)) for image in images]


def _picture(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1] as a data address."""
    values = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    values = values if values.shape[2] == 3 else values[:, :, 0]
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, format="png")
    return _data(buffer.getvalue())


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
