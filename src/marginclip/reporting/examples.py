"""Clean images, the same with the trigger, and the difference made visible."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from marginclip.record import RunRecord
from marginclip.reporting.rows import describe
from marginclip.reporting.style import Arrays, new_figure

MAX_IMAGES = 8
LONGEST_NAME = 14
TIMES = "\N{MULTIPLICATION SIGN}"


def example_figures(record: RunRecord, arrays: Arrays) -> dict[str, Figure]:
    """``examples`` from ``examples/clean`` and ``examples/triggered`` (n, C, H, W) in [0, 1], C 1 or 3; nothing without both.

    ``examples/labels`` and ``examples/targets`` (n,), if there, head the columns, by their names in ``record.classes``.
    """
    if "examples/clean" not in arrays or "examples/triggered" not in arrays:
        return {}
    clean, triggered = arrays["examples/clean"][:MAX_IMAGES], arrays["examples/triggered"][:MAX_IMAGES]
    if not len(clean) or clean.shape != triggered.shape or clean.shape[1] not in (1, 3):
        return {}
    difference = np.abs(triggered - clean)
    factor = amplification(float(difference.max()))
    rows = {"clean": clean, "triggered": triggered, f"|difference|\n{TIMES} {factor:g}": np.clip(difference * factor, 0, 1)}
    return {"examples": _draw(rows, _headings(record, arrays, len(clean)), f"Trigger: {describe(record)}")}


def amplification(largest: float) -> float:
    """The factor, with two significant digits, that brings the largest difference, in [0, 1], close to but not over 1."""
    if largest <= 0:
        return 1.0
    factor = 1 / largest
    digits = 1 - math.floor(math.log10(factor))
    # The small addition keeps a factor such as 1 / 0.1 from being cut to the next lower number by rounding errors.
    return max(1.0, float(math.floor(factor * 10**digits + 1e-3) / 10**digits))


def _draw(rows: dict[str, np.ndarray], headings: list[str], title: str) -> Figure:
    num_images = len(headings)
    figure = new_figure(1.5 + 1.35 * max(num_images, 3), 5.2, title)
    for row, (name, images) in enumerate(rows.items()):
        for column, image in enumerate(images):
            axes = figure.add_subplot(len(rows), num_images, row * num_images + column + 1)
            axes.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(headings[column], fontsize=9)
            if column == 0:
                axes.set_ylabel(name, fontsize=11)
    return figure


def _headings(record: RunRecord, arrays: Arrays, num_images: int) -> list[str]:
    """A heading for each image, ``label`` and below it ``→ target``; empty strings where neither is known."""
    parts = [(arrays.get("examples/labels"), ""), (arrays.get("examples/targets"), "→ ")]
    known = [(values[:num_images], mark) for values, mark in parts if values is not None and len(values) >= num_images]
    return ["\n".join(mark + _short_name(record, int(values[image])) for values, mark in known) for image in range(num_images)]


def _short_name(record: RunRecord, number: int) -> str:
    name = record.class_name(number)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
