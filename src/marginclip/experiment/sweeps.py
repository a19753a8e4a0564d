"""The Hydra callback that reports a multirun's failed cells when all are through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from marginclip.experiment.command import report_sweep


class SweepReport(Callback):
    """Runs once in the launching process, after the last job."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        report_sweep(Path(config.hydra.sweep.dir))
