"""The progress of a training, shown as a task."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import lightning as L

from marginclip.experiment import progress


class TrainingProgress(L.Callback):
    """Shows a fit under ``name``, by its batches; with several devices that of the first process."""

    def __init__(self, name: str) -> None:
        self.name, self.kind, self.process = name, type(progress.display()), os.getpid()
        self.stack, self.task = ExitStack(), progress.Task(name)
        self.most: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stack": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, stack=ExitStack())

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin, after the epochs that an interrupted fit has made. Epochs that a module takes only where it must count when they begin."""
        if not trainer.is_global_zero:
            return
        if os.getpid() != self.process:  # one of several devices' processes shows what the command would
            progress.use(self.kind())
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        self.most = int(batches * epochs) if epochs is not None and epochs > 0 and batches != float("inf") else None
        made = trainer.current_epoch * int(batches) if self.most is not None else 0
        usual = None if self.most is None else min(self.most, int(batches) * getattr(module, "usual_epochs", self.most))
        self.task = self.stack.enter_context(progress.task(self.name, usual, "batches", made))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """One more batch."""
        if trainer.is_global_zero:
            values = {**trainer.progress_bar_metrics}
            note = " ".join(
                f"{name.rpartition('/')[2]} {value:.3g}" for name, value in values.items() if isinstance(value, float)
            )
            if self.task.done == self.task.total:
                self.task.total = self.most
            self.task.advance(self.task.done + 1, note)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """It is through."""
        self.stack.close()

    def on_exception(self, *_: Any, **__: Any) -> None:
        """It ends early."""
        self.stack.close()
