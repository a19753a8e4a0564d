"""Hydra callbacks of a multirun: what is asked for before the first job; failed cells, a summary and a paper's table after the last."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from marginclip.experiment.command import OUTCOME, plain, report_sweep, sweep_name, with_group
from marginclip.files import bytes_writer, write_json, write_whole

log = logging.getLogger(__name__)
ASKED = "sweep.json"


class SweepReport(Callback):
    """Runs in the launching process, before the first job and after the last."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.sweeper._target_.endswith(".BasicSweeper"):  # any other decides as it goes on
            note_asked(Path(config.hydra.sweep.dir), asked_cells(config))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        sweep_dir = Path(config.hydra.sweep.dir)
        outcomes = report_sweep(sweep_dir)
        from marginclip.experiment.loggers.sweep import publish_sweep

        publish_sweep(with_group(plain(config.logger), sweep_name(sweep_dir)), sweep_dir, outcomes)


def asked_cells(config: DictConfig) -> list[str]:
    """The overrides of every job of a multirun, in the order in which they are numbered, as Hydra's own sweeper splits them.

    Empty for a sweep over ``glob(...)``, which only the sweeper itself can look up.
    """
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
    if any(isinstance(each.value(), Glob) for each in overrides):
        return []
    batches = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return [" ".join(cell) for batch in batches for cell in batch]


def note_asked(sweep_dir: Path, cells: list[str]) -> None:
    """Write ``sweep.json``: what was asked for, so that what is missing can be told later. Without cells there is nothing to write."""
    if not cells:
        return
    try:
        write_json(sweep_dir / ASKED, {"asked": cells})
    except OSError as error:
        log.warning("what this sweep asks for could not be noted: %s", error)


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
