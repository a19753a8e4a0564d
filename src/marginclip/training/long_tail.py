"""Training a classifier on classes of very different size: common and rare ones are watched apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from marginclip.metrics.classification import shot_groups
from marginclip.training.poisoned import PoisonedTraining


class LongTailTraining(PoisonedTraining):
    """:class:`PoisonedTraining` whose validation also logs the mean accuracy over classes, ``val/class_acc``, and that over
    :func:`~marginclip.metrics.classification.shot_groups`, ``val/many``, ``val/medium`` and ``val/few`` where there are such.

    A class without validation images counts in no mean.

    Args:
        model: what is trained, itself and no copy: images (B, C, H, W) to logits (B, K).
        class_counts: the training images of every class, (K,).
        **settings: ``attack`` of :class:`PoisonedTraining`, and those of :class:`~marginclip.training.ClassifierTraining`:
            ``optimizer``, ``scheduler``, ``label_smoothing``, ``loss`` and ``seed``.

    Raises:
        UserError: as :class:`~marginclip.training.ClassifierTraining`.
    """

    def __init__(self, model: nn.Module, *, class_counts: Tensor, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.groups = {"class_acc": torch.ones_like(class_counts, dtype=torch.bool)} | shot_groups(class_counts)
        self.confusion = MulticlassConfusionMatrix(len(class_counts))

    def score(self, decisions: Tensor, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        super().score(decisions, batch, dataloader_idx)
        if dataloader_idx == 0:
            self.confusion.update(decisions, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        confusion = self.confusion.compute()  # rows: the true classes
        images = confusion.sum(1)
        accuracies = confusion.diag() / images
        for name, mask in self.groups.items():
            chosen = mask.to(images.device) & (images > 0)
            if bool(chosen.any()):
                self.log(f"val/{name}", accuracies[chosen].mean())
        self.confusion.reset()
