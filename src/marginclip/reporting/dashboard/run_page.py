"""The page of one run."""

from __future__ import annotations

from typing import Any

import yaml

from marginclip.reporting.dashboard.pictures import Sheet
from marginclip.reporting.dashboard.published import published_for
from marginclip.reporting.dashboard.repeat import repeat_command
from marginclip.reporting.dashboard.runs import Run
from marginclip.reporting.dashboard.stages import stages
from marginclip.reporting.learning import PANELS
from marginclip.reporting.rows import ALL_METRICS, NATS, describe, label, metric, seconds
from marginclip.reporting.style import Arrays

MAX_CLASSES = 1000


def run_content(run: Run, arrays: Arrays, detections: list[dict[str, Any]], pictures: Sheet | None) -> dict[str, Any]:
    """What the template of a run shows, by its names."""
    record = run.record
    headings = [name for name in ALL_METRICS if any(metric(record, row, name) is not None for row in record.metrics)]
    rows = [row for row in record.metrics if row in record.rows]
    return {
        "run": run,
        "record": record,
        "described": describe(record),
        "headings": headings,
        "rows": [
            {
                "label": label(record, row),
                "values": {name: figure(name, metric(record, row, name)) for name in headings},
                "seconds": seconds(record, row),
                "paper": published_for(record, row),
            }
            for row in rows
        ],
        "command": repeat_command(record),
        "config": yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True, width=120),
        "findings": yaml.safe_dump(record.findings, sort_keys=False, allow_unicode=True, width=120) if record.findings else "",
        "classes": _classes(run, rows),
        "detections": detections,
        "stages": stages(arrays),
        "learning": _learning(run),
        "recorded": {
            each["row"]: {key: round(value, 6) for key, value in record.metrics[each["row"]].items() if value is not None}
            for each in detections
            if each["row"] in record.metrics
        },
        "sheet": pictures,
    }


def figure(name: str, value: float | None) -> str:
    """A metric as tables show it: shares in percent, AUC in [0, 1], NLL in nats."""
    if value is None:
        return "–"
    return f"{value:.3f}" if name in ("AUC", NATS) else f"{100 * value:.1f}"


def _classes(run: Run, rows: list[str]) -> dict[str, Any] | None:
    """The accuracy of every class for each row, in percent; None where the run has none, or more than ``MAX_CLASSES`` classes."""
    record = run.record
    known = [row for row in rows if row in record.per_class]
    count = len(record.per_class[known[0]]) if known else 0
    if not 0 < count <= MAX_CLASSES:
        return None
    return {
        "labels": [label(record, row) for row in known],
        "rows": [
            {
                "name": record.class_name(number),
                "count": None if record.training_counts is None else record.training_counts[number],
                "values": [record.per_class[row][number] for row in known],
            }
            for number in range(count)
        ],
    }


def _learning(run: Run) -> list[dict[str, Any]]:
    """A curve for each quantity of the history, with None where a check has no value of it."""
    history = run.record.history
    return [
        {"title": panel.title, "unit": panel.unit, "values": [_scaled(entry.get(panel.key), panel.factor) for entry in history]}
        for panel in PANELS
        if any(entry.get(panel.key) is not None for entry in history)
    ]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else float(f"{factor * value:.4g}")
