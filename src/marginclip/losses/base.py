"""What every loss has in common: the model that it needs, the value of a batch, and a second stage of training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from marginclip.errors import require

Network = Callable[[Tensor], Tensor]


class Loss:
    """What a training step minimises. A subclass writes :meth:`__call__`, and :meth:`adapt` where it needs another model.

    ``cosine`` says whether the loss wants a cosine classifier; both stages must want the same.

    Args:
        second_stage: what follows when the training with this loss is done. None: nothing.
    """

    cosine = False

    def __init__(self, *, second_stage: SecondStage | None = None) -> None:
        require(
            second_stage is None or isinstance(second_stage, SecondStage),
            f"loss.second_stage must be a second stage of training or null, got {second_stage!r}",
        )
        require(
            second_stage is None or second_stage.loss.cosine == self.cosine,
            "loss.second_stage.loss must go on with the classifier of the first stage: gcl and ldam train a cosine one, mixup a linear one",
        )
        self.second_stage = second_stage

    def head(self, model: nn.Module, num_classes: int) -> nn.Module:
        """``model`` with the classifier that the loss wants, for a checkpoint to be loaded into: here ``model`` itself."""
        del num_classes
        return model

    def adapt(self, model: nn.Module, class_counts: Tensor) -> nn.Module:
        """The model to train, given the training images of every class, ``class_counts`` (K,): here ``model`` itself.

        A loss that needs another head returns a changed copy. Raises :class:`UserError` for a model or counts that do not fit.
        """
        del class_counts
        return model

    def alone(self) -> Loss:
        """The same loss, adapted as it is, without a second stage."""
        twin = copy.copy(self)
        twin.second_stage = None
        return twin

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Called before every epoch, from 0, of ``epochs``; for a loss that changes in the course of a training."""

    def __call__(self, model: Network, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch, images (B, C, H, W) and labels (B,); random are only draws from ``generator``, on the CPU.

        ``model`` maps images to logits (B, K).
        """
        raise TypeError(f"{type(self).__name__} does not say what it is")


class SecondStage:
    """A shorter training of the last layer alone, on batches that have every class equally often.

    It starts from the weights of the first stage. The learning rate falls to zero along a cosine.

    Args:
        loss: what it minimises; it has no second stage itself.
        epochs: a number, or, under 1, a share of ``training.epochs`` (published for GCL: 30 of 200).
        learning_rate: at the start.

    Raises:
        UserError: for numbers that make no training, and for a ``loss`` that has a second stage itself.
    """

    def __init__(self, *, loss: Loss, epochs: float = 0.15, learning_rate: float = 0.002) -> None:
        require(
            0 < epochs < 1 or (epochs >= 1 and float(epochs).is_integer()),
            f"loss.second_stage.epochs must be a whole number from 1 up, or a share of training.epochs in (0, 1), got {epochs:g}",
        )
        require(learning_rate > 0, f"loss.second_stage.learning_rate must be positive, got {learning_rate:g}")
        require(loss.second_stage is None, "loss.second_stage.loss.second_stage must be null: there are two stages at most")
        self.loss: Loss = loss
        self.epochs, self.learning_rate = epochs, learning_rate

    def num_epochs(self, first_epochs: int) -> int:
        """The epochs of this stage after ``first_epochs`` of the first one: at least one."""
        return int(self.epochs) if self.epochs >= 1 else max(1, round(self.epochs * first_epochs))
