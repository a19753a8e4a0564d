"""How the bounds were learned: what each check on the clean set found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from marginclip.record import RunRecord
from marginclip.reporting.rows import describe
from marginclip.reporting.style import CLEAN, Arrays, new_figure, tidy


@dataclass(frozen=True)
class Panel:
    """One quantity of the history: its key, its title, its unit and what to multiply it with."""

    key: str
    title: str
    unit: str
    factor: float = 1.0


PANELS = (
    Panel("agreement", "Accuracy on the images learned from", "%", 100),
    Panel("data", "Data term of the objective", "loss"),
    Panel("mean_margin", "Mean of the maximum margins", "logits"),
    Panel("max_margin", "Largest of the maximum margins", "logits"),
    Panel("lambda", "Weight of the margins, λ", "λ"),
    Panel("active_bounds", "Bounds that clip clean images", "% of bounds", 100),
)


def learning_figures(record: RunRecord, arrays: Arrays) -> dict[str, Figure]:
    """``learning``: a panel for each quantity in ``record.history``, which has an entry for each check; else nothing."""
    curves = {panel: curve for panel in PANELS if np.isfinite(curve := _curve(record.history, panel)).any()}
    if not curves:
        return {}
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(3.8 * columns, 2.7 * rows + 0.6, f"Learning the bounds: {describe(record)}")
    for position, (panel, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, position + 1)
        axes.plot(np.arange(len(curve)), curve, "o-", color=CLEAN, markersize=3.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        logarithmic = panel.key == "lambda" and _spans_a_decade(curve)
        axes.set_yscale("log" if logarithmic else "linear")
        unit = f"{panel.unit} (log scale)" if logarithmic else panel.unit
        tidy(axes, title=panel.title, xlabel=_check_label(record), ylabel=unit)
    return {"learning": figure}


def _curve(history: list[dict[str, float]], panel: Panel) -> np.ndarray:
    """The values of one quantity (checks,), NaN where a check has none."""
    return panel.factor * np.array([entry.get(panel.key, np.nan) for entry in history])


def _spans_a_decade(curve: np.ndarray) -> bool:
    return bool(np.nanmin(curve) > 0 and np.nanmax(curve) >= 10 * np.nanmin(curve))


def _check_label(record: RunRecord) -> str:
    every = record.setting("defense.check_every")
    return f"check (one every {every} steps)" if every else "check"
