"""The second stage of a training: the last layer alone, behind a fixed network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from marginclip.losses import final_layer
from marginclip.training.long_tail import LongTailTraining


class HeadTraining(LongTailTraining):
    """:class:`LongTailTraining` of the last layer of ``model``; the rest is frozen, in evaluation mode with its batch norms.

    Args:
        model: what is trained, itself and no copy: images (B, C, H, W) to logits (B, K). All but its last layer is frozen.
        **settings: those of :class:`LongTailTraining`: ``class_counts``, ``attack`` and the further ones.

    Raises:
        UserError: for a model whose last layer is neither linear nor of cosines; and as
            :class:`~marginclip.training.ClassifierTraining`.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.head = final_layer(model)
        model.requires_grad_(False)
        model.get_submodule(self.head).requires_grad_(True)

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        return self.model.get_submodule(self.head).parameters()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.model.eval()
