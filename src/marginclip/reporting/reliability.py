"""How far confidence can be believed, before and after the repair."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from marginclip.record import RunRecord
from marginclip.reporting.rows import before_and_after, describe, label
from marginclip.reporting.style import AFTER, BEFORE, BOUND, Arrays, new_figure, tidy


def reliability_figures(record: RunRecord, arrays: Arrays) -> dict[str, Figure]:
    """``reliability`` from ``reliability/<row>`` (bins, 3): number of images, mean confidence and accuracy of equal bins.

    Above, accuracy by confidence and the gap between the two, with the ECE; below, the share of images in each bin.
    """
    rows = before_and_after(record, [name.partition("/")[2] for name in arrays if name.startswith("reliability/")])
    rows = [row for row in rows if arrays[f"reliability/{row}"][:, 0].sum() > 0]
    if not rows:
        return {}
    figure = new_figure(4.6 * len(rows) + 0.4, 6.0, f"Reliability: {describe(record)}")
    panels = figure.subplots(2, len(rows), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, row in enumerate(rows):
        bins, colour = arrays[f"reliability/{row}"], BEFORE if row == "none" else AFTER
        _draw_gaps(panels[0, column], bins, colour)
        _draw_shares(panels[1, column], bins, colour)
        error = 100 * calibration_error(bins)
        tidy(
            panels[0, column],
            title=f"{label(record, row)}: ECE {error:.1f} %",
            xlabel="",
            ylabel="accuracy (%)" if not column else "",
        )
        tidy(panels[1, column], title="", xlabel="confidence (%)", ylabel="images (%)" if not column else "")
    entries = {text: handle for handle, text in zip(*panels[0, 0].get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, frameon=False)
    return {"reliability": figure}


def calibration_error(bins: np.ndarray) -> float:
    """ECE of reliability bins (bins, 3), in [0, 1]: the gap of confidence and accuracy, averaged over images."""
    gaps = np.nan_to_num(np.abs(bins[:, 1] - bins[:, 2]))
    return float((gaps * bins[:, 0]).sum() / bins[:, 0].sum())


def _draw_gaps(axes: Axes, bins: np.ndarray, colour: str) -> None:
    filled = bins[:, 0] > 0
    confidence, accuracy = 100 * bins[filled, 1], 100 * bins[filled, 2]
    centres, width = _places(len(bins))
    axes.plot([0, 100], [0, 100], "--", color=BOUND, linewidth=1.2, label="perfect calibration", zorder=3)
    axes.bar(centres[filled], accuracy, width, color=colour, edgecolor="white", linewidth=0.5)
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": BOUND, "hatch": "///", "linewidth": 0.6, "alpha": 0.7}
    axes.bar(centres[filled], confidence - accuracy, width, bottom=accuracy, label="gap to the mean confidence", **style)
    axes.set(xlim=(0, 100), ylim=(0, 103))


def _draw_shares(axes: Axes, bins: np.ndarray, colour: str) -> None:
    centres, width = _places(len(bins))
    axes.bar(centres, 100 * bins[:, 0] / bins[:, 0].sum(), width, color=colour, edgecolor="white", linewidth=0.5)


def _places(num_bins: int) -> tuple[np.ndarray, float]:
    """Centres (bins,) and width of equal bins from 0 to 100."""
    width = 100 / num_bins
    return (np.arange(num_bins) + 0.5) * width, width
