"""The maximum margin of every class, by which MM-BD judges a model."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from marginclip.record import RunRecord
from marginclip.reporting.rows import describe
from marginclip.reporting.style import CLEAN, TRIGGERED, Arrays, new_figure, tidy

MAX_NAMES = 20


def margin_figures(record: RunRecord, arrays: Arrays) -> dict[str, Figure]:
    """``maximum_margins`` from ``record.detection``: a bar for each class, the suspect's in another colour and hatched."""
    detection = record.detection
    if detection is None:
        return {}
    statistics, suspect, target = np.asarray(detection.statistics), detection.suspect, detection.true_target
    figure = new_figure(max(6.0, min(0.55 * len(statistics), 14.0)), 4.2, f"Maximum margins: {describe(record)}")
    axes = figure.add_subplot()
    bars = axes.bar(np.arange(len(statistics)), statistics, color=CLEAN)
    bars[suspect].set(color=TRIGGERED, hatch="//", edgecolor="white", label=f"largest: {record.class_name(suspect)}")
    if target is not None:
        axes.plot(target, max(statistics[target], 0), "v", color="black", markersize=8, clip_on=False)
        axes.plot([], [], "v", color="black", linestyle="none", label="the attack's target")
    if len(statistics) <= MAX_NAMES:
        names = [record.class_name(number) for number in range(len(statistics))]
        axes.set_xticks(np.arange(len(statistics)), names, rotation=30, ha="right")
    axes.legend(loc="best")
    verdict = "detected" if detection.detected else "not detected"
    tidy(axes, title=f"backdoor {verdict}, p = {detection.p_value:.2g}", xlabel="class", ylabel="maximum margin (logits)")
    return {"maximum_margins": figure}
