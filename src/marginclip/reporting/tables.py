"""The metrics of one run as a table for the terminal."""

from __future__ import annotations

from typing import IO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from marginclip.record import RunRecord
from marginclip.reporting.rows import NATS, columns, describe, label, metric, seconds

SECONDS = "seconds"


def result_table(record: RunRecord) -> Table:
    """A row for each entry of ``record.metrics``, in order.

    The columns are those of :func:`marginclip.reporting.rows.columns`. Shares are in percent but AUC, which is in [0, 1]; NLL is in
    nats, and seconds are those spent to obtain the row (see :func:`marginclip.reporting.rows.seconds`). A missing value is "-"; a
    column without any value, as ASR without an attack, is left out.
    """
    rows = list(record.metrics)
    shown = {heading: [_cell(heading, metric(record, row, heading)) for row in rows] for heading in columns(record)}
    shown[SECONDS] = [_cell(SECONDS, seconds(record, row)) for row in rows]
    shown = {heading: cells for heading, cells in shown.items() if any(cell != "-" for cell in cells)}
    table = Table(
        title=_title(record), caption=_caption(record), box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True
    )
    table.add_column("defense", min_width=12)  # long names take two lines, so that the numbers stay whole
    for heading in shown:
        table.add_column(_heading(heading), justify="right", no_wrap=True)
    for position, row in enumerate(rows):
        table.add_row(escape(label(record, row)), *(cells[position] for cells in shown.values()))
    return table


def print_table(record: RunRecord, file: IO[str] | None = None) -> None:
    """Write :func:`result_table` to ``file``, or to the standard output."""
    Console(file=file).print(result_table(record))


def _heading(heading: str) -> str:
    return heading if heading in ("AUC", NATS, SECONDS) else f"{heading} %"


def _cell(heading: str, value: float | None) -> str:
    if value is None:
        return "-"
    if heading in ("AUC", NATS):
        return f"{value:.3f}"
    return f"{value:.1f}" if heading == SECONDS else f"{100 * value:.1f}"


def _title(record: RunRecord) -> str:
    """What was run, and its seed."""
    return escape(f"{describe(record)}, seed {record.seed}")


def _caption(record: RunRecord) -> str | None:
    if record.status == "attack_failed":
        return "the attack failed: these numbers say nothing about the defense"
    if record.status == "failed":
        return "the run failed"
    seen = "measured on the clean set itself, which the defense has seen: on new images it does worse"
    told = [seen] if record.evaluated_on == "clean_set" else []
    if not any("asr" in row for row in record.metrics.values()):
        told.append("no trigger was tested: unchanged accuracy does not mean that the model is safe")
    return "; ".join(told) or None
