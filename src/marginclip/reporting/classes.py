"""Accuracy of every class before and after the repair, over the numbers of training images (paper 2, Fig. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from marginclip.record import RunRecord
from marginclip.reporting.rows import before_and_after, describe, label
from marginclip.reporting.style import AFTER, BEFORE, BOUND, Arrays, new_figure, tidy

MAX_NAMES = 20
MAX_BARS = 240


@dataclass(frozen=True)
class Series:
    """Accuracies of all classes (K,), fractions, NaN where there is none; ``deviation`` (K,) or None; text and colour."""

    text: str
    colour: str
    accuracy: np.ndarray
    deviation: np.ndarray | None = None

    @property
    def caption(self) -> str:
        """The text with the mean over classes."""
        return f"{self.text} (mean {100 * np.nanmean(self.accuracy):.1f} %)"


def class_figures(record: RunRecord, arrays: Arrays) -> dict[str, Figure]:
    """``class_accuracy`` from ``record.per_class``: the model as given and its repair, over ``record.training_counts``."""
    colours = (BEFORE, AFTER)
    rows = before_and_after(record, record.per_class)
    series = [Series(label(record, row), colour, accuracies(record, row)) for row, colour in zip(rows, colours, strict=False)]
    if not series or np.isnan(series[0].accuracy).all():
        return {}
    num_classes = len(series[0].accuracy)
    figure = new_figure(class_width(num_classes), 4.6, f"Accuracy of each class: {describe(record)}")
    axes = figure.add_subplot()
    draw_classes(axes, series, class_names(record, num_classes))
    handles, texts = axes.get_legend_handles_labels()
    if record.training_counts is not None:
        handles.append(_draw_counts(axes, np.asarray(record.training_counts)))
        texts.append("training images (right axis)")
    figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False)
    return {"class_accuracy": figure}


def accuracies(record: RunRecord, row: str) -> np.ndarray:
    """The accuracies (K,) of all classes in a row of ``record.per_class``, fractions; NaN where there is none."""
    return np.array([np.nan if value is None else value for value in record.per_class[row]], dtype=float)


def class_names(record: RunRecord, num_classes: int) -> list[str] | None:
    """Names for the classes on an axis; None for too many to be read."""
    if num_classes > MAX_NAMES:
        return None
    return [record.class_name(number) for number in range(num_classes)]


def class_width(num_classes: int) -> float:
    """Inches for an axis of so many classes."""
    return max(6.4, min(0.6 * num_classes + 1.6, 14.0))


def draw_classes(axes: Axes, series: list[Series], names: list[str] | None, *, title: str = "") -> None:
    """Accuracies in percent, side by side for each class: bars, or steps where these would be too many."""
    num_classes = len(series[0].accuracy)
    places = np.arange(num_classes)
    draw = _draw_bars if num_classes * len(series) <= MAX_BARS else _draw_steps
    draw(axes, series, places)
    if names is not None:
        slanted = max(map(len, names)) > 3
        axes.set_xticks(places, names, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.set(xlim=(-0.6, num_classes - 0.4), ylim=(0, 103))
    tidy(axes, title=title, xlabel="class", ylabel="accuracy (%)")
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)


def _draw_bars(axes: Axes, series: list[Series], places: np.ndarray) -> None:
    width = 0.8 / len(series)
    for number, each in enumerate(series):
        left = places + (number - (len(series) - 1) / 2) * width
        errors = None if each.deviation is None else 100 * each.deviation
        style: dict[str, Any] = {"ecolor": BOUND, "error_kw": {"elinewidth": 0.8}}
        axes.bar(left, 100 * each.accuracy, width, yerr=errors, color=each.colour, label=each.caption, **style)


def _draw_steps(axes: Axes, series: list[Series], places: np.ndarray) -> None:
    for each in series:
        axes.plot(places, 100 * each.accuracy, drawstyle="steps-mid", color=each.colour, linewidth=1.4, label=each.caption)


def _draw_counts(axes: Axes, counts: np.ndarray) -> Line2D:
    """The curve of training images on an axis of its own, logarithmic where they span a decade."""
    right = axes.twinx()
    marker = "o" if len(counts) <= MAX_NAMES else ""
    (line,) = right.plot(np.arange(len(counts)), counts, color=BOUND, marker=marker, markersize=4, linewidth=1.5)
    logarithmic = counts.min() > 0 and counts.max() >= 10 * counts.min()
    if logarithmic:
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter(NullFormatter())
    else:
        right.set_ylim(0, 1.03 * counts.max())
    right.set_ylabel("training images (log scale)" if logarithmic else "training images")
    right.spines[["top", "left"]].set_visible(False)
    return line
