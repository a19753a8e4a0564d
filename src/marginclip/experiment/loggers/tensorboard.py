"""``logger=tensorboard``: curves, figures, and a table of runs (HPARAMS) with their results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from marginclip.errors import UserError
from marginclip.experiment.loggers.base import Destination, LoggedRun, summary_metrics
from marginclip.record import RunRecord


class TensorBoard(Destination):
    """Writes ``tensorboard/`` in the folder of the run; ``tensorboard --logdir runs`` shows all runs."""

    def start(self, run: LoggedRun) -> None:
        """See :meth:`Destination.start`. Raises :class:`UserError` where TensorBoard is not installed."""
        try:
            from lightning.pytorch.loggers import TensorBoardLogger

            self.lightning = TensorBoardLogger(str(run.folder), name="tensorboard", version="", default_hp_metric=False)
        except ImportError as error:
            raise UserError("logger=tensorboard is not installed: pip install 'marginclip[tensorboard]'") from error
        self.run = run

    def publish(self, record: RunRecord, figures: list[Path]) -> None:
        """See :meth:`Destination.publish`."""
        settings = {**self.run.labels, "victim": self.run.victim, "status": record.status} | dict(scalars(record.identity))
        self.lightning.log_hyperparams(settings, summary_metrics(record))
        for path in figures:
            with Image.open(path) as image:
                self.lightning.experiment.add_image(f"figures/{path.stem}", np.asarray(image.convert("RGB")), dataformats="HWC")
        self.lightning.save()


def scalars(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """The numbers and words of nested settings by dotted key."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{path}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            yield f"{path}{key}", value
