"""All runs as one table for the browser: every setting, every evaluated row, small enough for hundreds of runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from marginclip.reporting.dashboard.published import Published, published_for
from marginclip.reporting.dashboard.runs import Run, flat
from marginclip.reporting.rows import NATS, label, metric, seconds, success_before

DIGITS = 5
# Metrics in the order of tables -> whether less is better.
METRICS = {"ACC": False, "ASR": True, "PACC": False, "TPR": False, "FPR": True, "AUC": False, "WORST": False, "MANY": False}
METRICS |= {"MEDIUM": False, "FEW": False, "ECE": True, "NLL": True}
ABSENT = "(absent)"


def table(runs: list[Run], curves: dict[str, list[list[float]]]) -> dict[str, Any]:
    """The table; ``curves`` are the ROC curves by slug.

    ``settings`` has for each dotted key the distinct ``values``, as text, and for each run the ``index`` of its own; a key of one value
    has no index. ``identity`` names the settings on which a result depends. ``rows`` has a list for each column over all pairs of a run
    and an evaluated row. Shares are rounded to ``DIGITS`` decimals.
    """
    published: list[Published] = []
    return {
        "runs": {
            "slug": [run.slug for run in runs],
            "name": [run.record.folder.name for run in runs],
            "victim": _coded(run.victim for run in runs)["index"],
            "before": [_rounded(success_before(run.record)) for run in runs],
        },
        "settings": {key: _compact(_coded(column)) for key, column in _settings(runs).items()},
        "identity": sorted({key for run in runs for key, _ in flat(run.record.identity)}),
        "rows": _rows(runs, published),
        "published": [{"source": each.source, "metrics": each.metrics} for each in published],
        "metrics": [{"name": name, "less": less, "share": name not in ("AUC", NATS)} for name, less in METRICS.items()],
        "seconds": [run.record.seconds for run in runs],
        "curves": [curves.get(run.slug) for run in runs],
    }


def _settings(runs: list[Run]) -> dict[str, list[str]]:
    """What a run can be sorted by: its status, where it ran, and its whole configuration."""
    each = [
        {
            "status": run.record.status,
            "seed": str(run.record.seed),
            "clean images": str(run.record.clean_set_size),
            "device": ABSENT if run.record.device is None else f"{run.record.device.accelerator} {run.record.device.name}",
            "precision": run.record.precision or ABSENT,
            "marginclip": run.record.versions.get("marginclip", ABSENT),
            "torch": run.record.versions.get("torch", ABSENT),
        }
        | {key: value for key, value in flat(run.record.config) if key != "seed"}
        for run in runs
    ]
    return {key: [found.get(key, ABSENT) for found in each] for key in dict.fromkeys(key for found in each for key in found)}


def _coded(column: Iterable[str]) -> dict[str, Any]:
    codes: dict[str, int] = {}
    index = [codes.setdefault(value, len(codes)) for value in column]
    return {"values": list(codes), "index": index}


def _compact(coded: dict[str, Any]) -> dict[str, Any]:
    return coded if len(coded["values"]) > 1 else {"values": coded["values"]}


def _rows(runs: list[Run], published: list[Published]) -> dict[str, Any]:
    pairs = [(number, run, row) for number, run in enumerate(runs) for row in run.record.metrics if row in run.record.rows]
    found: dict[str, Any] = {
        "run": [number for number, _, _ in pairs],
        "method": _coded(label(run.record, row) for _, run, row in pairs),
        "main": [int(row == run.main_row) for _, run, row in pairs],
        "given": [int(row == "none") for _, _, row in pairs],
        "seconds": [_rounded(seconds(run.record, row), 2) for _, run, row in pairs],
        "published": [_position(published, published_for(run.record, row)) for _, run, row in pairs],
    }
    found["figures"] = {name: [_rounded(metric(run.record, row, name)) for _, run, row in pairs] for name in METRICS}
    found["figures"] = {name: values for name, values in found["figures"].items() if any(value is not None for value in values)}
    return found


def _position(published: list[Published], found: Published | None) -> int | None:
    if found is None:
        return None
    if found not in published:
        published.append(found)
    return published.index(found)


def _rounded(value: float | None, digits: int = DIGITS) -> float | None:
    return None if value is None else round(value, digits)
