"""Per-class accuracy across runs: short against long training, and by lambda (paper 2, Fig. 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from marginclip.errors import require
from marginclip.files import write_whole
from marginclip.record import RunRecord
from marginclip.reporting.classes import Series, accuracies, class_names, class_width, draw_classes
from marginclip.reporting.figures import save_png
from marginclip.reporting.groups import LEFT_OUT, SWEPT, Group, row_group, section, section_title, swept, swept_text
from marginclip.reporting.rows import before_and_after, label
from marginclip.reporting.style import AFTER, BEFORE, TRIGGERED, new_figure

Setting = tuple[Group, Group, tuple[float | None, ...]]
Sweep = dict[float, list[RunRecord]]


def draw_over_training(records: Iterable[RunRecord], path: Path) -> Path:
    """Write the accuracy of every class after short and after long training, before and after the repair, to the PNG ``path``.

    A row for each setting whose runs differ in ``training.epochs``, of which the fewest and the most are shown. Raises
    :class:`UserError` when there is none.
    """
    return _draw_sweeps(records, path, option="--over-training", varied="epochs", figure_of=over_training_figure)


def draw_lambdas(records: Iterable[RunRecord], path: Path) -> Path:
    """Write the accuracy of every class after a repair with each lambda (``defense.lambda_.initial``) to the PNG ``path``.

    A panel for each setting whose runs differ in lambda. Raises :class:`UserError` when there is none.
    """
    return _draw_sweeps(records, path, option="--lambdas", varied="λ", figure_of=lambda_figure)


def sweeps(records: Iterable[RunRecord], varied: str) -> dict[Setting, Sweep]:
    """The settings whose finished runs with per-class accuracy have several values of ``varied``, one of ``SWEPT``.

    A setting is all that a row of the summary tells apart, but ``varied``; each value has its runs, which differ by seed.
    """
    found: dict[Setting, Sweep] = {}
    for record in records:
        value = swept(record, varied)
        if value is None or record.status in LEFT_OUT or not before_and_after(record, record.per_class):
            continue
        others = tuple(swept(record, name) for name in SWEPT if name != varied)
        found.setdefault((section(record), row_group(record), others), {}).setdefault(value, []).append(record)
    return {setting: dict(sorted(runs.items())) for setting, runs in found.items() if len(runs) > 1}


def over_training_figure(settings: dict[Setting, Sweep]) -> Figure:
    """A row of panels for each setting: the model as given and, where there is one, its repair."""
    rows = {setting: _rows_of_all(runs) for setting, runs in settings.items()}
    num_columns = max(map(len, rows.values()))
    figure, panels = _panels("Short and long training", settings, num_columns)
    for setting, line in zip(settings, panels, strict=True):
        runs = settings[setting]
        for row, axes in zip(rows[setting], line, strict=False):
            ends = ((min(runs), BEFORE), (max(runs), AFTER))
            series = [_series(runs[epochs], row, swept_text("epochs", epochs), colour) for epochs, colour in ends]
            _draw(axes, series, runs, f"{_row_label(runs, row)}\n{_title(setting, 'epochs')}")
            axes.set(ylim=(0, 118), yticks=range(0, 101, 20))  # room for the legend above the bars
            axes.legend(loc="upper right", ncols=2, frameon=False)
        for axes in line[len(rows[setting]) :]:
            axes.set_axis_off()
    return figure


def lambda_figure(settings: dict[Setting, Sweep]) -> Figure:
    """A panel for each setting: a colour for each lambda, and the model as given as a line."""
    figure, panels = _panels("Accuracy of each class by λ", settings, 1)
    for setting, (axes,) in zip(settings, panels, strict=True):
        runs = settings[setting]
        row = _rows_of_all(runs)[-1]
        shades = colormaps["viridis"](np.linspace(0.9, 0.1, len(runs)))
        series = [
            _series(runs[value], row, swept_text("λ", value), to_hex(shade)) for value, shade in zip(runs, shades, strict=True)
        ]
        _draw(axes, series, runs, f"{_row_label(runs, row)}\n{_title(setting, 'λ')}")
        given = _series(
            [record for records in runs.values() for record in records], "none", _row_label(runs, "none"), TRIGGERED
        )
        places = np.arange(len(given.accuracy))
        axes.hlines(100 * given.accuracy, places - 0.42, places + 0.42, color=TRIGGERED, linewidth=2, label=given.caption)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _draw_sweeps(
    records: Iterable[RunRecord], path: Path, *, option: str, varied: str, figure_of: Callable[[dict[Setting, Sweep]], Figure]
) -> Path:
    require(not path.is_dir(), f"{option} must be a file, but '{path}' is a folder")
    found = sweeps(records, varied)
    require(bool(found), f"{option} needs finished runs of one setting that differ in {SWEPT[varied]}, with per-class accuracy")
    return write_whole(path, partial(save_png, figure_of(found)))


def _rows_of_all(runs: Sweep) -> list[str]:
    """The rows, before and after the repair, that every run has."""
    each = [before_and_after(record, record.per_class) for records in runs.values() for record in records]
    return [row for row in each[0] if all(row in rows for rows in each)]


def _series(records: list[RunRecord], row: str, text: str, colour: str) -> Series:
    """Mean over the runs, with the sample deviation where there are several."""
    values = np.stack([accuracies(record, row) for record in records])
    deviation = values.std(0, ddof=1) if len(values) > 1 else None
    return Series(text, colour, values.mean(0), deviation)


def _panels(title: str, settings: dict[Setting, Sweep], num_columns: int) -> tuple[Figure, np.ndarray]:
    num_classes = max(
        len(record.per_class["none"]) for runs in settings.values() for records in runs.values() for record in records
    )
    figure = new_figure(class_width(num_classes) * num_columns, 4.2 * len(settings) + 0.4, title)
    return figure, figure.subplots(len(settings), num_columns, squeeze=False)


def _draw(axes: Axes, series: list[Series], runs: Sweep, title: str) -> None:
    draw_classes(axes, series, class_names(_first(runs), len(series[0].accuracy)), title=title)


def _row_label(runs: Sweep, row: str) -> str:
    return label(_first(runs), row)


def _first(runs: Sweep) -> RunRecord:
    return next(iter(runs.values()))[0]


def _title(setting: Setting, varied: str) -> str:
    """The setting in words, in lines of some 45 letters, but for what is varied in it; without an attack, none is named."""
    group, (attack, x2x, _), values = setting
    parts = [section_title(group), "" if attack == "none" else f"{attack} {x2x}"]
    others = [name for name in SWEPT if name != varied]
    parts += [swept_text(name, value) for name, value in zip(others, values, strict=True) if value is not None]
    return "\n".join(wrap(", ".join(part for part in parts if part), 45))
