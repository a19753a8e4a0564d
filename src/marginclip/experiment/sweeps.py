"""The Hydra callback that reports a multirun's failed cells when all are through, and logs its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from marginclip.experiment.command import plain, report_sweep, sweep_name, with_group


class SweepReport(Callback):
    """Runs once in the launching process, after the last job."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        sweep_dir = Path(config.hydra.sweep.dir)
        outcomes = report_sweep(sweep_dir)
        from marginclip.experiment.loggers.sweep import publish_sweep

        publish_sweep(with_group(plain(config.logger), sweep_name(sweep_dir)), sweep_dir, outcomes)
