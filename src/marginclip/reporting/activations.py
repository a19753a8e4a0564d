"""How far triggers drive the activations of each feature map, and where the bounds cut (paper 1, Fig. 2 and 3)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from marginclip.record import RunRecord
from marginclip.reporting.rows import describe
from marginclip.reporting.style import BOUND, CLEAN, TRIGGERED, Arrays, new_figure, tidy

MAX_PANELS = 4
KEYS = ("clean_max", "clean_min", "triggered_max", "triggered_min", "upper", "lower")
# Extreme -> the bound that cuts it. Only activations that can be negative, such as LeakyReLU, have minima of interest.
SIDES = {"max": "upper", "min": "lower"}


def activation_figures(record: RunRecord, arrays: Arrays) -> dict[str, Figure]:
    """``activations``: a panel for each of up to four activation calls, spread over depth; nothing without ``clean_max``.

    Reads ``KEYS`` below ``activations/<site>/``, all (channels,) in activation units; all but ``clean_max`` may be missing. The
    names of the sites sort in the order of execution. Minima and lower bounds are drawn only where a minimum is negative.
    """
    sites = sorted(name.split("/", 1)[1].rsplit("/", 1)[0] for name in arrays if _is_clean_maximum(name))
    if not sites:
        return {}
    chosen = spread(sites)
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(5.2 * columns, 3.4 * rows + 0.9, f"Activations of each feature map: {describe(record)}")
    for position, site in enumerate(chosen):
        axes = figure.add_subplot(rows, columns, position + 1)
        _draw_site(axes, {key: arrays[name] for key in KEYS if (name := f"activations/{site}/{key}") in arrays})
        title = f"{site}  ({sites.index(site) + 1} of {len(sites)})"
        tidy(axes, title=title, xlabel="feature map, sorted by clean maximum", ylabel="activation (model units)")
    entries = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, frameon=False)
    return {"activations": figure}


def spread(sites: list[str]) -> list[str]:
    """Up to four of the sites, in order: the first, the last, and two evenly between."""
    positions = np.linspace(0, len(sites) - 1, min(MAX_PANELS, len(sites))).round().astype(int)
    return [sites[position] for position in positions]


def _is_clean_maximum(name: str) -> bool:
    return name.startswith("activations/") and name.endswith("/clean_max") and name.count("/") >= 2


def _draw_site(axes: Axes, values: dict[str, np.ndarray]) -> None:
    order = np.argsort(values["clean_max"], kind="stable")
    ranks = np.arange(1, len(order) + 1)
    drawn_minima = any((values[key] < 0).any() for key in ("clean_min", "triggered_min") if key in values)
    for side in SIDES if drawn_minima else ["max"]:
        name = "maximum" if side == "max" else "minimum"
        dash = "-" if side == "max" else "--"
        if f"triggered_{side}" in values:
            marker = "^" if side == "max" else "v"
            triggered = values[f"triggered_{side}"][order]
            axes.plot(ranks, triggered, marker, color=TRIGGERED, markersize=4, label=f"{name}, triggered images")
        if f"clean_{side}" in values:
            axes.plot(ranks, values[f"clean_{side}"][order], dash, color=CLEAN, linewidth=2, label=f"{name}, clean images")
        bound = SIDES[side]
        if bound in values:
            cut, text = values[bound][order], f"learned {bound} bound"
            axes.plot(ranks, cut, dash, color=BOUND, linewidth=1.2, drawstyle="steps-mid", label=text)
    if not drawn_minima:
        axes.set_ylim(bottom=0)
