"""Which classes are taken for which, before and after the repair."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from marginclip.record import RunRecord
from marginclip.reporting.classes import class_names
from marginclip.reporting.rows import before_and_after, describe, label
from marginclip.reporting.style import Arrays, new_figure

MAX_WRITTEN = 12
DARK = 45  # percent, from which on white numbers are easier to read
SIDE = 4.6


def confusion_figures(record: RunRecord, arrays: Arrays) -> dict[str, Figure]:
    """``confusion`` from ``confusion/<row>`` (K, K), images, rows the true class: a panel before and one after the repair."""
    rows = before_and_after(record, [name.partition("/")[2] for name in arrays if name.startswith("confusion/")])
    if not rows:
        return {}
    figure = new_figure(SIDE * len(rows) + 1.4, SIDE + 0.6, f"Confusion: {describe(record)}")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        picture = _draw(axes, arrays[f"confusion/{row}"], record, label(record, row))
    ticks = [0, 1, 5, 10, 25, 50, 75, 100]
    figure.colorbar(
        picture, ax=list(panels), label="% of the true class's images (square-root scale)", ticks=ticks, shrink=0.85
    )
    return {"confusion": figure}


def shares(confusion: np.ndarray) -> np.ndarray:
    """Percent of each row (K, K); NaN for a class without images."""
    total = confusion.sum(1, keepdims=True)
    return 100 * confusion / np.where(total > 0, total, np.nan)


def _draw(axes: Axes, confusion: np.ndarray, record: RunRecord, text: str) -> AxesImage:
    percent, num_classes = shares(confusion), len(confusion)
    picture = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if num_classes <= MAX_WRITTEN:
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:
                colour = "white" if value > DARK else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    names = class_names(record, num_classes)
    if names is not None:
        slanted = max(map(len, names)) > 3
        axes.set_xticks(range(num_classes), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
        axes.set_yticks(range(num_classes), names)
    correct = 100 * np.trace(confusion) / confusion.sum()
    axes.set_title(f"{text}: {correct:.1f} % correct", fontsize=11)
    axes.set(xlabel="decision", ylabel="true class")
    return picture
