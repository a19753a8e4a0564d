"""Many runs as one Markdown summary: means and standard deviations over seeds."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from marginclip.errors import UserError
from marginclip.record import RunRecord, find_records, read_record
from marginclip.reporting.groups import LEFT_OUT, Group, row_group, section, section_title, split_swept
from marginclip.reporting.rows import METRICS, NATS, columns, label, metric, seconds, success_before

log = logging.getLogger(__name__)

NAMES = ("attack", "x2x", "defense", "row")
DATA_SEEDS = ("subset_seed", "split_seed")  # another one is other data
MAX_SETTINGS = 6


def load_records(runs_dir: Path) -> list[RunRecord]:
    """Every record below ``runs_dir``, in the order of their paths.

    A file that cannot be read as a record is skipped with a logged warning that names it and says why.
    """
    records = []
    for folder in find_records(runs_dir):
        try:
            records.append(read_record(folder))
        except UserError as error:
            log.warning("skipped: %s", error)
    return records


def summarise(records: Iterable[RunRecord]) -> str:
    """The records as Markdown: a section for each data set, model, imbalance, loss and clean-set size, in it a table row for each
    entry of ``metrics`` of each attack, X2X setting and defense, and of each lambda and number of epochs where these vary.

    Models with an attack and balanced classes have one table, others another, with the metrics of
    :func:`marginclip.reporting.rows.columns` that any of them has. Values are means ± sample standard deviations over seeds, in
    percent (NLL in nats, seconds in seconds); one seed has no deviation.
    Records with status ``attack_failed`` or ``failed`` are listed below the table and are in no mean. Runs in one row that
    differ in another setting than the seed are pointed out.
    """
    sections: dict[Group, dict[Group, list[RunRecord]]] = {}
    for record in records:
        sections.setdefault(section(record), {}).setdefault(row_group(record), []).append(record)
    parts = ["# Summary of runs", "Mean ± sample standard deviation over seeds; shares in percent."]
    for group in sorted(sections, key=_natural):
        parts += _section_text(group, divided(sections[group]))
    return "\n\n".join(parts) + "\n"


# -- groups -------------------------------------------------------------------------------------------------------------------


def divided(cells: dict[Group, list[RunRecord]]) -> dict[Group, list[RunRecord]]:
    """The cells in order, those in which a sweep varied lambda or the epochs divided by these."""
    return {
        (*names, f"{defense} ({varied})" if varied else defense): records
        for *names, defense in sorted(cells)
        for varied, records in split_swept(cells[*names, defense]).items()
    }


def _natural(group: Group) -> list[tuple[int, str]]:
    """A sort key under which numbers come in the order of their size."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in group]


# -- text ---------------------------------------------------------------------------------------------------------------------


def _section_text(group: Group, cells: dict[Group, list[RunRecord]]) -> Iterator[str]:
    yield f"## {section_title(group)}"
    counted = {key: [record for record in records if record.status not in LEFT_OUT] for key, records in cells.items()}
    backdoored = {key: records for key, records in counted.items() if all(columns(record) is METRICS for record in records)}
    others = {key: records for key, records in counted.items() if key not in backdoored}
    yield from _table(backdoored, METRICS)
    headings = [heading for records in others.values() for record in records for heading in columns(record)]
    yield from _table(others, [heading for heading in dict.fromkeys(headings) if _measured(others, heading)])
    left_out = [record for records in cells.values() for record in records if record.status in LEFT_OUT]
    if left_out:
        entries = [f"- `{record.folder.name}`: {_reason(record)}" for record in left_out]
        yield f"Left out of the means ({len(left_out)}):\n\n" + "\n".join(entries)
    notes = [note for key, records in counted.items() if (note := mixed(key, records))]
    if notes:
        yield "Mixed settings:\n\n" + "\n".join(f"- {note}" for note in notes)


def _table(cells: dict[Group, list[RunRecord]], headings: Iterable[str]) -> Iterator[str]:
    """The table of some cells; nothing where they have no rows."""
    headings = list(headings)
    rows = [row for key, records in cells.items() for row in _rows(key, records, headings)]
    if rows:
        shown = [heading if heading == NATS else f"{heading} %" for heading in headings]
        numbers = ["seeds", *shown, "seconds"]
        yield "\n".join(_line(row) for row in ((*NAMES, *numbers), ["---"] * len(NAMES) + ["---:"] * len(numbers), *rows))


def _measured(cells: dict[Group, list[RunRecord]], heading: str) -> bool:
    """Whether any row of any record has the metric."""
    records = [record for records in cells.values() for record in records]
    return any(metric(record, row, heading) is not None for record in records for row in record.metrics)


def _line(entries: Iterable[str]) -> str:
    return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |"


def _rows(key: Group, records: list[RunRecord], headings: list[str]) -> Iterator[list[str]]:
    """A table row for each metrics entry that any of the records has."""
    for row in dict.fromkeys(row for record in records for row in record.metrics):
        having = [record for record in records if row in record.metrics]
        num_seeds = len({record.seed for record in having})
        metrics = [_metric_spread([metric(record, row, heading) for record in having], heading) for heading in headings]
        took = _spread([seconds(record, row) for record in having])
        yield [*key, label(having[0], row), str(num_seeds), *metrics, took]


def _metric_spread(values: list[float | None], heading: str) -> str:
    return _spread(values, digits=3) if heading == NATS else _spread(values, scale=100)


def _spread(values: list[float | None], *, scale: float = 1, digits: int = 1) -> str:
    """Mean ± sample deviation with so many decimals; fewer values than runs are counted in brackets, none at all are "-"."""
    found = [scale * value for value in values if value is not None]
    if not found:
        return "-"
    text = f"{statistics.fmean(found):.{digits}f}"
    if len(found) > 1:
        text += f" ± {statistics.stdev(found):.{digits}f}"
    return text if len(found) == len(values) else f"{text} (n={len(found)})"


def _reason(record: RunRecord) -> str:
    """Why a record is left out, with the ASR of the victim where that is why."""
    reason = LEFT_OUT[record.status]
    success = success_before(record)
    if record.status == "attack_failed" and success is not None:
        reason += f" (ASR without defense {100 * success:.1f} %)"
    return f"{' '.join(row_group(record))}, seed {record.seed}: {reason}"


def mixed(key: Group, records: list[RunRecord]) -> str | None:
    """A note when runs of one row differ in other settings than the seed, or repeat a seed; None when all is well."""
    settings = [dict(flat(record.identity)) for record in records]
    missing = object()
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [key for key in keys if any(each.get(key, missing) != settings[0].get(key, missing) for each in settings)]
    num_seeds = len({record.seed for record in records})
    if differing:
        more = f" and {len(differing) - MAX_SETTINGS} more" if len(differing) > MAX_SETTINGS else ""
        return f"{' '.join(key)}: the means are over runs that differ in {', '.join(differing[:MAX_SETTINGS])}{more}"
    if num_seeds < len(records):
        return f"{' '.join(key)}: {len(records)} runs, but only {num_seeds} different seed{'s' if num_seeds > 1 else ''}"
    return None


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What identifies a run by dotted key, without the seeds, in which the runs of one row differ."""
    for key, entry in value.items():
        if key.endswith("seed") and key not in DATA_SEEDS:
            continue
        if isinstance(entry, dict):
            yield from flat(entry, f"{path}{key}.")
        else:
            yield f"{path}{key}", entry
