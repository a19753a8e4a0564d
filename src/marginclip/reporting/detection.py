"""How well the detection statistic tells triggered from clean images (paper 1, Fig. 4 and 5)."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from marginclip.record import RunRecord
from marginclip.reporting.rows import describe, label
from marginclip.reporting.style import BOUND, CLEAN, NEUTRAL, TRIGGERED, Arrays, new_figure, tidy

NUM_BINS = 40


def roc_curve(clean: np.ndarray, triggered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates of "the statistic is at least t", for t from above all scores down to the lowest.

    ``clean`` (N,) and ``triggered`` (M,) are scores, higher for triggered. Returns two arrays of shares in [0, 1], from 0 to 1,
    one entry longer than there are distinct scores. Tied scores move both rates at once, so that the area under the line is the
    chance that a triggered image scores higher than a clean one, ties counting one half. Raises ``ValueError`` when there are
    no scores of a kind.
    """
    if not len(clean) or not len(triggered):
        raise ValueError(f"a ROC curve needs scores of both kinds, got {len(clean)} clean and {len(triggered)} triggered")
    thresholds = np.unique(np.concatenate([clean, triggered]))[::-1]
    rates = [1 - np.searchsorted(np.sort(scores), thresholds) / len(scores) for scores in (clean, triggered)]
    return np.concatenate([[0.0], rates[0]]), np.concatenate([[0.0], rates[1]])


def area_under(false_rates: np.ndarray, true_rates: np.ndarray) -> float:
    """The area under a ROC curve by the trapezoidal rule, a share in [0, 1]."""
    return float(torch.trapezoid(torch.from_numpy(true_rates), torch.from_numpy(false_rates)))


def detection_figures(record: RunRecord, arrays: Arrays) -> dict[str, Figure]:
    """``detection_<row>`` for each row with ``scores/<row>_clean`` (N,), in logits.

    Histograms of clean and triggered statistics with the threshold, and the ROC curve; without ``scores/<row>_triggered`` (M,),
    the clean histogram alone.
    """
    figures = {}
    for row in record.rows:
        clean, triggered = (arrays.get(f"scores/{row}_{kind}", np.empty(0)) for kind in ("clean", "triggered"))
        if len(clean):
            title = f"Detection by {label(record, row)}: {describe(record)}"
            figures[f"detection_{row}"] = _draw(title, clean, triggered, threshold_of(record))
    return figures


def threshold_of(record: RunRecord) -> float | None:
    """The statistic above which the detector flags, in logits; None where there is no detector or it is infinite."""
    return None if record.detector is None else record.detector["threshold"]


def _draw(title: str, clean: np.ndarray, triggered: np.ndarray, threshold: float | None) -> Figure:
    attacked = len(triggered) > 0
    figure = new_figure(11 if attacked else 6.5, 4.6, title)
    _draw_histograms(figure.add_subplot(1, 2 if attacked else 1, 1), clean, triggered, threshold)
    if attacked:
        _draw_roc(figure.add_subplot(1, 2, 2), clean, triggered, threshold)
    return figure


def _draw_histograms(axes: Axes, clean: np.ndarray, triggered: np.ndarray, threshold: float | None) -> None:
    bins = np.histogram_bin_edges(np.concatenate([clean, triggered]), NUM_BINS)
    for scores, name, colour, hatch in ((clean, "clean", CLEAN, ""), (triggered, "triggered", TRIGGERED, "//")):
        if len(scores):
            values, edges = np.histogram(scores, bins)
            share, text = 100 * values / len(scores), f"{name} ({len(scores)} images)"
            axes.stairs(share, edges, fill=True, fc=colour, ec=colour, alpha=0.5, hatch=hatch, label=text)
    if threshold is not None:
        axes.axvline(threshold, color=BOUND, linestyle="--", linewidth=1.5, label=f"threshold {threshold:.3g}")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend above the bars
    axes.legend(loc="upper right")
    tidy(axes, title="Detection statistic", xlabel="margin lost to the bounds (logits)", ylabel="share of images (%)")


def _draw_roc(axes: Axes, clean: np.ndarray, triggered: np.ndarray, threshold: float | None) -> None:
    false_rates, true_rates = roc_curve(clean, triggered)
    axes.plot([0, 100], [0, 100], ":", color=NEUTRAL, label="chance")
    axes.plot(100 * false_rates, 100 * true_rates, color=CLEAN, linewidth=2, label="ROC curve")
    if threshold is not None:
        flagged = [100 * float((scores > threshold).mean()) for scores in (clean, triggered)]
        text = f"at the threshold: TPR {flagged[1]:.1f} %, FPR {flagged[0]:.1f} %"
        axes.plot(*flagged, "o", color=TRIGGERED, markersize=8, label=text, clip_on=False, zorder=3)
    axes.legend(loc="lower right")
    axes.set(xlim=(0, 100), ylim=(0, 101))
    title = f"ROC curve, AUC {area_under(false_rates, true_rates):.3f}"
    tidy(axes, title=title, xlabel="false positives (% of clean images)", ylabel="true positives (% of triggered images)")
