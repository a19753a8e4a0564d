"""Many runs as one Markdown summary: means and standard deviations over seeds."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from marginclip.reporting.rows import METRICS, Record, label, metric, seconds

log = logging.getLogger(__name__)

Group = tuple[str, ...]
LEFT_OUT = {"attack_failed": "attack failed", "failed": "run failed"}
COLUMNS = ("attack", "x2x", "defense", "row", "seeds", *(f"{heading} %" for heading in METRICS), "seconds")
# Settings in which the runs of one row may differ without measuring different things.
MAY_DIFFER = ("seed", "runs_dir", "logger", "trainer", "hydra", "figures")
MAX_SETTINGS = 6


def load_records(runs_dir: Path) -> list[Record]:
    """The content of every ``run.json`` below ``runs_dir``, in the order of their paths, each with its folder as ``path``.

    A file that cannot be read or that holds no run record is skipped with a logged warning that names it.
    """
    records = []
    for file in sorted(Path(runs_dir).rglob("run.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            log.warning("skipped %s: it cannot be read (%s)", file, error)
            continue
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            log.warning("skipped %s: it is not the record of a run (no 'config')", file)
            continue
        records.append(record | {"path": str(file.parent)})
    return records


def summarise(records: Iterable[Record]) -> str:
    """The records as Markdown: a section for each data set, model and clean-set size, in it a table row for each entry of
    ``metrics`` of each attack, X2X setting and defense.

    Values are means ± sample standard deviations over seeds, in percent (seconds in seconds); one seed has no deviation.
    Records with status ``attack_failed`` or ``failed`` are listed below the table and are in no mean. Runs in one row that
    differ in another setting than the seed are pointed out.
    """
    sections: dict[Group, dict[Group, list[Record]]] = {}
    for record in records:
        sections.setdefault(_section(record), {}).setdefault(_cell(record), []).append(record)
    parts = ["# Summary of runs", "Mean ± sample standard deviation over seeds; shares in percent."]
    for section in sorted(sections, key=_natural):
        parts += _section_text(section, sections[section])
    return "\n\n".join(parts) + "\n"


# -- groups -------------------------------------------------------------------------------------------------------------------


def _section(record: Record) -> Group:
    """Data set, model (with width and, where it is not ReLU, activation), clean-set size and what was evaluated on."""
    model = record["config"].get("model") or {}
    details = [f"width {model['width']}"] if model.get("width") is not None else []
    if model.get("activation") not in (None, "relu"):
        details.append(str(model["activation"]))
    described = _name(record, "model") + (f" ({', '.join(details)})" if details else "")
    evaluated = ", evaluated on the clean set itself" if record.get("evaluated_on") == "clean_set" else ""
    return _name(record, "dataset"), described, str(record.get("clean_set_size", "-")), evaluated


def _cell(record: Record) -> Group:
    """Attack, X2X setting (none without an attack) and defense."""
    attack = _name(record, "attack")
    return attack, "-" if attack == "none" else _name(record, "x2x"), _name(record, "defense")


def _name(record: Record, group: str) -> str:
    return str((record["config"].get(group) or {}).get("name", "-"))


def _natural(group: Group) -> list[tuple[int, str]]:
    """A sort key under which numbers come in the order of their size."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in group]


# -- text ---------------------------------------------------------------------------------------------------------------------


def _section_text(section: Group, cells: dict[Group, list[Record]]) -> Iterator[str]:
    dataset, model, clean, evaluated = section
    yield f"## {dataset}, {model}, clean set of {clean}{evaluated}"
    counted = {cell: [record for record in cells[cell] if record.get("status") not in LEFT_OUT] for cell in sorted(cells)}
    rows = [row for cell, records in counted.items() for row in _rows(cell, records)]
    if rows:
        yield "\n".join(_line(row) for row in (COLUMNS, ["---"] * 4 + ["---:"] * (len(COLUMNS) - 4), *rows))
    left_out = [record for cell in sorted(cells) for record in cells[cell] if record.get("status") in LEFT_OUT]
    if left_out:
        entries = [f"- {_run_name(record)}: {_reason(record)}" for record in left_out]
        yield f"Left out of the means ({len(left_out)}):\n\n" + "\n".join(entries)
    mixed = [note for cell, records in counted.items() if (note := _mixed(cell, records))]
    if mixed:
        yield "Mixed settings:\n\n" + "\n".join(f"- {note}" for note in mixed)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rows(cell: Group, records: list[Record]) -> Iterator[list[str]]:
    """A table row for each metrics entry that any of the records has."""
    for row in dict.fromkeys(row for record in records for row in record.get("metrics") or {}):
        having = [record for record in records if row in (record.get("metrics") or {})]
        num_seeds = len({record["config"].get("seed") for record in having})
        metrics = [_spread([metric(record, row, heading) for record in having], scale=100) for heading in METRICS]
        took = _spread([seconds(record, row) for record in having])
        yield [*cell, label(row), str(num_seeds), *metrics, took]


def _spread(values: list[float | None], *, scale: float = 1) -> str:
    """Mean ± sample deviation with one decimal; fewer values than runs are counted in brackets, none at all are "-"."""
    found = [scale * value for value in values if value is not None]
    if not found:
        return "-"
    text = f"{statistics.fmean(found):.1f}"
    if len(found) > 1:
        text += f" ± {statistics.stdev(found):.1f}"
    return text if len(found) == len(values) else f"{text} (n={len(found)})"


def _run_name(record: Record) -> str:
    return f"`{Path(record['path']).name}`" if "path" in record else f"seed {record['config'].get('seed')}"


def _reason(record: Record) -> str:
    """Why a record is left out, with the ASR of the victim where that is why."""
    reason = LEFT_OUT[record["status"]]
    success = ((record.get("metrics") or {}).get("none") or {}).get("asr")
    if record["status"] == "attack_failed" and success is not None:
        reason += f" (ASR without defense {100 * success:.1f} %)"
    return f"{' '.join(_cell(record))}, seed {record['config'].get('seed')}: {reason}"


def _mixed(cell: Group, records: list[Record]) -> str | None:
    """A note when runs of one cell differ in other settings than the seed, or repeat a seed; None when all is well."""
    settings = [dict(_flat(record["config"])) for record in records]
    missing = object()
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [key for key in keys if any(each.get(key, missing) != settings[0].get(key, missing) for each in settings)]
    num_seeds = len({record["config"].get("seed") for record in records})
    if differing:
        more = f" and {len(differing) - MAX_SETTINGS} more" if len(differing) > MAX_SETTINGS else ""
        return f"{' '.join(cell)}: the means are over runs that differ in {', '.join(differing[:MAX_SETTINGS])}{more}"
    if num_seeds < len(records):
        return f"{' '.join(cell)}: {len(records)} runs, but only {num_seeds} different seed{'s' if num_seeds > 1 else ''}"
    return None


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a config by dotted key, without those that may differ between the runs of one row."""
    for key, entry in value.items():
        if key.endswith("seed") or (not path and key in MAY_DIFFER):
            continue
        if isinstance(entry, dict):
            yield from _flat(entry, f"{path}{key}.")
        else:
            yield f"{path}{key}", entry
