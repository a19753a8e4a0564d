"""Training a backdoored classifier: the data is poisoned, the loop is the ordinary one, and ASR is watched beside ACC."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from marginclip.attacks import Attack
from marginclip.metrics import AttackSuccessRate, CleanAccuracy, PoisonedAccuracy
from marginclip.training.classifier import ClassifierTraining


class PoisonedTraining(ClassifierTraining):
    """:class:`ClassifierTraining` whose validation logs ``val/acc`` on the first loader and ``val/asr``, ``val/pacc`` on the second.

    Triggered batches hold ``targets`` and ``sources`` (B,); without an attack there is no second loader. A third one holds cross
    triggers, whose share of true labels is ``val/cross_acc``.

    Args:
        model: what is trained, itself and no copy: images (B, C, H, W) to logits (B, K).
        attack: the one that the data module poisons with; it is on the device, in checkpoints and in the mode of the training.
            None: there is no attack.
        **settings: those of :class:`~marginclip.training.ClassifierTraining`: ``optimizer``, ``scheduler``,
            ``label_smoothing``, ``loss`` and ``seed``.

    Raises:
        UserError: as :class:`~marginclip.training.ClassifierTraining`.
    """

    def __init__(self, model: nn.Module, *, attack: Attack | None = None, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.attack = attack
        self.accuracy, self.success, self.poisoned_accuracy = CleanAccuracy(), AttackSuccessRate(), PoisonedAccuracy()
        self.cross_accuracy = PoisonedAccuracy()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.score(self.model(batch["images"]).argmax(1), batch, dataloader_idx)

    def score(self, decisions: Tensor, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        """Count the decisions (B,) on a validation batch."""
        if dataloader_idx == 0:
            self.accuracy.update(decisions, batch["labels"])
            self.log("val/acc", self.accuracy, prog_bar=True, add_dataloader_idx=False, on_epoch=True)
            return
        if dataloader_idx == 2:
            self.cross_accuracy.update(decisions, batch["sources"])
            self.log("val/cross_acc", self.cross_accuracy, add_dataloader_idx=False, on_epoch=True)
            return
        self.success.update(decisions, batch["targets"])
        self.poisoned_accuracy.update(decisions, batch["sources"])
        self.log("val/asr", self.success, prog_bar=True, add_dataloader_idx=False, on_epoch=True)
        self.log("val/pacc", self.poisoned_accuracy, add_dataloader_idx=False, on_epoch=True)
