"""Training a backdoored classifier: the data is poisoned, the loop is the ordinary one, and ASR is watched beside ACC."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from marginclip.metrics import AttackSuccessRate, CleanAccuracy, PoisonedAccuracy
from marginclip.training.classifier import ClassifierTraining


class PoisonedTraining(ClassifierTraining):
    """:class:`ClassifierTraining` whose validation logs ``val/acc`` on the first loader and ``val/asr``, ``val/pacc`` on the second.

    Triggered batches hold ``targets`` and ``sources`` (B,); without an attack there is no second loader.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.accuracy, self.success, self.poisoned_accuracy = CleanAccuracy(), AttackSuccessRate(), PoisonedAccuracy()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        decisions = self.model(batch["images"]).argmax(1)
        if dataloader_idx == 0:
            self.accuracy.update(decisions, batch["labels"])
            self.log("val/acc", self.accuracy, prog_bar=True, add_dataloader_idx=False, on_epoch=True)
            return
        self.success.update(decisions, batch["targets"])
        self.poisoned_accuracy.update(decisions, batch["sources"])
        self.log("val/asr", self.success, prog_bar=True, add_dataloader_idx=False, on_epoch=True)
        self.log("val/pacc", self.poisoned_accuracy, add_dataloader_idx=False, on_epoch=True)
