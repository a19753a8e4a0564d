"""What is asked of the images and models of a caller, and a pass over the images that leaves the model as it was."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from marginclip.errors import UserError, first_line, require
from marginclip.networks.memory import images_at_once

log = logging.getLogger(__name__)


def check_images(images: Tensor) -> None:
    """Raise :class:`UserError` unless ``images`` is a tensor (N, C, H, W) of numbers in [0, 1] in float32 or float64."""
    require(isinstance(images, Tensor), f"images must be a torch tensor, got {type(images).__name__}")
    require(images.dim() == 4, f"images must be (N, C, H, W), got {tuple(images.shape)}")
    _check_dtype("images must be", images.dtype, advice="; divide bytes by 255" if images.dtype == torch.uint8 else "")
    require(len(images) > 0, "at least one image is needed, got none")
    lowest, highest = float(images.min()), float(images.max())
    require(math.isfinite(lowest) and math.isfinite(highest), "images must be finite, got NaN or infinite values")
    require(
        lowest >= 0 and highest <= 1,
        f"images must lie in [0, 1], got values from {lowest:.3g} to {highest:.3g}; put the normalisation inside the model",
    )


def check_full_precision(model: nn.Module) -> None:
    """Raise :class:`UserError` for a model in half precision: the bounds and margins need more."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            _check_dtype("the model must compute in", parameter.dtype, advice=" (model.float())")


def _check_dtype(what: str, dtype: torch.dtype, *, advice: str = "") -> None:
    require(
        dtype in (torch.float32, torch.float64), f"{what} float32 or float64{advice}, got {str(dtype).removeprefix('torch.')}"
    )


@torch.no_grad()
def batched_logits(model: nn.Module, images: Tensor, *, batch_size: int | None = None) -> Tensor:
    """The logits (N, K) of images (N, C, H, W) in evaluation mode, batch by batch on the model's device, where they stay.

    ``batch_size`` None is 250, and less for large images (:func:`~marginclip.networks.memory.images_at_once`).
    The modes of the model's modules are left as they were. Raises :class:`UserError` for a model that does not return logits, and
    for images that it does not take.
    """
    device = next((parameter.device for parameter in model.parameters()), images.device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        found = [_of_batch(model, batch.to(device)) for batch in images.split(batch_size or images_at_once(images))]
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        size = " x ".join(str(side) for side in images.shape[1:])
        raise UserError(f"the model does not take images of {size} ({first_line(error)})") from error
    finally:
        for module in training:
            module.training = True
    odd = next((type(logits).__name__ for logits in found if not isinstance(logits, Tensor)), None)
    require(odd is None, f"the model must return one tensor of logits, not a {odd}")
    require(found[0].dim() == 2, f"the model must return logits (N, K), got {tuple(found[0].shape)}")
    require(
        found[0].shape[1] >= 2, "the model gives one logit: margins are between classes, so give one for each of at least 2"
    )
    return torch.cat([logits.float() for logits in found])


def _of_batch(model: nn.Module, batch: Tensor) -> Tensor:
    """What the model gives for a batch. A single image goes twice: some models squeeze a batch of one away."""
    if len(batch) != 1:
        found: Tensor = model(batch)
        return found
    twice = model(torch.cat([batch, batch]))
    return twice[:1] if isinstance(twice, Tensor) and twice.dim() == 2 else twice


def clean_logits(model: nn.Module, images: Tensor, *, batch_size: int | None = None) -> Tensor:
    """:func:`batched_logits` on clean images.

    Raises :class:`UserError` for images that do not lie in [0, 1], a model in half precision, one that does not take the images, and
    logits that are not finite.
    """
    check_full_precision(model)
    check_images(images)
    logits = batched_logits(model, images, batch_size=batch_size)
    bad = int((~torch.isfinite(logits).all(1)).sum())
    require(bad == 0, f"the model gives NaN or infinite logits for {bad} of {len(images)} clean images; it cannot be repaired")
    return logits


def class_numbers(labels: Tensor) -> Tensor:
    """Whole numbers of any type as int64, which losses ask for; anything else as it is, for :func:`check_clean_set` to refuse."""
    return labels.long() if isinstance(labels, Tensor) and _are_whole(labels) else labels


def _are_whole(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def check_clean_set(images: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raise :class:`UserError` unless images (N, C, H, W) lie in [0, 1] and labels (N,), of whole numbers, in [0, num_classes)."""
    check_images(images)
    require(isinstance(labels, Tensor), f"labels must be a torch tensor, got {type(labels).__name__}")
    require(
        labels.dim() == 1 and _are_whole(labels),
        f"labels must be whole numbers of shape (N,), got {str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}",
    )
    require(len(images) == len(labels), f"one label an image is needed, got {len(images)} images and {len(labels)} labels")
    lowest, highest = int(labels.min()), int(labels.max())
    require(0 <= lowest and highest < num_classes, f"labels must be in 0..{num_classes - 1}, got {lowest}..{highest}")


def smallest_class(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """How many of the labels (N,) the class with the fewest has, of all classes that the model tells apart in images (N, C, H, W).

    Raises :class:`UserError` for images, labels or models that do not fit.
    """
    labels, classes = class_numbers(labels), clean_logits(model, images[:1]).shape[1]
    check_clean_set(images, labels, classes)
    return int(labels.bincount(minlength=classes).min())


def warn_if_poor(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Warn of a model that decides most clean images (N, C, H, W) otherwise than their labels (N,) say: something is amiss."""
    logits = clean_logits(model, images)
    check_clean_set(images, labels, logits.shape[1])
    correct = float((logits.argmax(1).cpu() == labels.cpu()).float().mean())
    if correct < 0.5:
        log.warning(
            "the model decides only %.0f %% of the clean images as labelled: check the order of the classes, the range of the images "
            "([0, 1]; a normalisation belongs inside the model) and the labels", 100 * correct,
        )  # fmt: skip
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-4):
        log.warning(
            "the model seems to end in a softmax: give one that returns logits, since margins are differences of logits"
        )
