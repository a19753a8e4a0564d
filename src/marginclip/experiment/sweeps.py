"""Hydra callbacks for the end of a multirun: failed cells, a summary for the loggers, and a table of the paper beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from marginclip.experiment.command import plain, report_sweep, sweep_name, with_group
from marginclip.files import bytes_writer, write_whole
from marginclip.sweep_files import OUTCOME


class SweepReport(Callback):
    """Runs once in the launching process, after the last job."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        sweep_dir = Path(config.hydra.sweep.dir)
        outcomes = report_sweep(sweep_dir)
        from marginclip.experiment.loggers.sweep import publish_sweep

        publish_sweep(with_group(plain(config.logger), sweep_name(sweep_dir)), sweep_dir, outcomes)


class PublishedTable(Callback):
    """Prints a ``table`` of the paper beside what the sweep measured, and writes it into the sweep's folder."""

    def __init__(self, *, table: str) -> None:
        self.table = table

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        print(write_published(self.table, Path(config.hydra.sweep.dir)), end="", flush=True)


def write_published(table: str, sweep_dir: Path) -> str:
    """The table of the finished runs of a sweep, also written to ``<table>.md`` in its folder."""
    from marginclip.record import read_record
    from marginclip.reporting.published import published_table

    outcomes = [json.loads(path.read_text()) for path in sorted(sweep_dir.glob(f"*/{OUTCOME}"))]
    records = [read_record(Path(outcome["record"]).parent) for outcome in outcomes if outcome["record"] is not None]
    text = published_table(table, records)
    write_whole(sweep_dir / f"{table}.md", bytes_writer(text.encode()))
    return text
