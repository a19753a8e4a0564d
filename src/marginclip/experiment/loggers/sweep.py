"""What is logged of a sweep as a whole: a row for every run, and the means over seeds of every attack and defense."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from marginclip.errors import UserError
from marginclip.experiment.loggers.base import destination, summary_metrics
from marginclip.record import RunRecord, read_record
from marginclip.reporting.groups import LEFT_OUT, named
from marginclip.reporting.summary import flat

log = logging.getLogger(__name__)
GROUPS = ("dataset", "model", "attack", "x2x", "defense")
SHOWN = ("none/", "repaired/", "detector/")
Tables = dict[str, tuple[list[str], list[list[Any]]]]


def publish_sweep(loggers: Mapping[str, Any], sweep_dir: Path, outcomes: Iterable[Mapping[str, Any]]) -> None:
    """Send the tables of a finished sweep to those loggers that keep them; ``outcomes`` say where the records are."""
    records = list(readable(each["record"] for each in outcomes if each["record"]))
    destinations = [destination(name, settings) for name, settings in loggers.items()]
    for each in destinations if records else []:
        each.publish_sweep(sweep_dir, sweep_tables(records))


def readable(paths: Iterable[str]) -> Iterable[RunRecord]:
    """The records among files; ``marginclip train`` leaves others."""
    for path in paths:
        try:
            if Path(path).name == "run.json":
                yield read_record(Path(path).parent)
        except UserError as error:
            log.warning("skipped: %s", error)


def sweep_tables(records: list[RunRecord]) -> Tables:
    """``runs``: groups, what else was varied, seed, status and metrics of every run. ``pivot``: means over the runs in which all but the
    seed is equal, and whose attack took."""
    metrics = {id(record): _shown(record) for record in records}
    columns = sorted({name for found in metrics.values() for name in found})
    varied = _varied(records)
    settings = {id(record): tuple(str(dict(flat(record.identity)).get(key, "")) for key in varied) for record in records}
    runs = [
        [
            *_groups(record),
            *settings[id(record)],
            record.seed,
            record.status,
            *(metrics[id(record)].get(name) for name in columns),
        ]
        for record in records
    ]
    cells: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        if record.status not in LEFT_OUT:
            cells.setdefault(_groups(record) + settings[id(record)], []).append(record)
    pivot = [
        [*group, len(having), *(_mean(metrics[id(record)].get(name) for record in having) for name in columns)]
        for group, having in sorted(cells.items())
    ]
    names = [*GROUPS, *varied]
    return {"runs": ([*names, "seed", "status", *columns], runs), "pivot": ([*names, "runs", *columns], pivot)}


def _varied(records: list[RunRecord]) -> list[str]:
    """The settings, but for seeds, in which runs of equal groups differ."""
    found: dict[str, None] = {}
    for group in {_groups(record) for record in records}:
        settings = [dict(flat(record.identity)) for record in records if _groups(record) == group]
        keys = dict.fromkeys(key for each in settings for key in each)
        found |= dict.fromkeys(key for key in keys if len({str(each.get(key, "")) for each in settings}) > 1)
    return sorted(found)


def _groups(record: RunRecord) -> tuple[str, ...]:
    return tuple(named(record, group) for group in GROUPS)


def _shown(record: RunRecord) -> dict[str, float]:
    return {name: value for name, value in summary_metrics(record).items() if name.startswith(SHOWN)}


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None
