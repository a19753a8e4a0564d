"""What every defense has in common: a model and clean samples in, a repaired module out."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from marginclip.errors import require
from marginclip.maxmargin.inputs import batched_logits, check_full_precision, check_images

Model = TypeVar("Model", bound=nn.Module)


class Defense(L.LightningModule):
    """A post-training repair, run by a Trainer: ``prepare(model, images, labels)``, ``Trainer.fit``, ``repaired()``.

    It sees the model and the clean set and nothing else: no trigger, no poisoned or test data. The model that it was given is
    never changed. ``learns`` is False where there is nothing to fit.
    """

    learns = True

    def check_model(self, model: nn.Module, image: Tensor) -> None:
        """Raise :class:`UserError`, before anything is trained, for a model, trained or not, that the method cannot work on.

        ``image`` (1, C, H, W) is of the size that the model takes.
        """

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Take the model and the clean set: images (N, C, H, W) in [0, 1], labels (N,). What an earlier repair left is forgotten."""
        raise TypeError(f"{type(self).__name__} does not say how it prepares")

    def repaired(self) -> nn.Module:
        """The repaired network, a new module that maps images to logits."""
        raise TypeError(f"{type(self).__name__} does not say what it repaired")

    def batches(self) -> DataLoader[int]:
        """What the Trainer iterates over."""
        raise TypeError(f"{type(self).__name__} does not learn")

    def variants(self) -> dict[str, nn.Module]:
        """Further networks to evaluate beside the repaired one, by the name of their row in the results."""
        return {}

    def findings(self) -> dict[str, Any]:
        """What the defense found out, for the record; plain values only."""
        return {}

    def arrays(self) -> dict[str, Tensor]:
        """Tensors to keep with the run, for figures."""
        return {}

    @property
    def num_epochs(self) -> int:
        """How many rounds over :meth:`batches` the repair takes."""
        return 0


def own_copy(model: Model) -> Model:
    """A copy of ``model`` that shares nothing with it, in evaluation mode and its own memory layout: its logits are the same bits."""
    with torch.inference_mode(False):
        return copy.deepcopy(model).eval()


def clean_logits(model: nn.Module, images: Tensor, *, batch_size: int = 250) -> Tensor:
    """:func:`~marginclip.maxmargin.inputs.batched_logits` on clean images.

    Raises :class:`UserError` for a model in half precision, one that does not take the images, and logits that are not finite.
    """
    check_full_precision(model)
    require(isinstance(images, Tensor), f"images must be a torch tensor, got {type(images).__name__}")
    logits = batched_logits(model, images, batch_size=batch_size)
    bad = int((~torch.isfinite(logits).all(1)).sum())
    require(bad == 0, f"the model gives NaN or infinite logits for {bad} of {len(images)} clean images; it cannot be repaired")
    return logits


def check_clean_set(images: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raise :class:`UserError` unless images (N, C, H, W) lie in [0, 1] and labels (N,), of whole numbers, in [0, num_classes)."""
    check_images(images)
    require(isinstance(labels, Tensor), f"labels must be a torch tensor, got {type(labels).__name__}")
    require(
        labels.dim() == 1 and not labels.is_floating_point() and labels.dtype != torch.bool,
        f"labels must be whole numbers of shape (N,), got {str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}",
    )
    require(len(images) == len(labels), f"one label an image is needed, got {len(images)} images and {len(labels)} labels")
    lowest, highest = int(labels.min()), int(labels.max())
    require(0 <= lowest and highest < num_classes, f"labels must be in 0..{num_classes - 1}, got {lowest}..{highest}")
