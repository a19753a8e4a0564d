"""Images that another library decodes, brought to one size in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from marginclip.data.images import check_depth, image_tensor
from marginclip.errors import UserError, require

Labelled = tuple[Image.Image, int]


def labelled(sample: Any, title: str) -> Labelled:
    """A sample of the data set ``title`` as an image and its class; raises :class:`UserError` where it has no single class."""
    image, label, *_ = sample if isinstance(sample, tuple) and len(sample) > 1 else (None, None)
    if not isinstance(image, Image.Image) or isinstance(label, bool) or not isinstance(label, int):
        raise UserError(
            f"{title} is no data set of images with one class each: a sample holds {_kinds(sample)}; use dataset=image_folder"
        )
    return image, label


def decode_all(
    samples: Iterable[Labelled], *, count: int | None, size: int | None, grey: bool, memory_bytes: float, title: str
) -> tuple[Tensor, Tensor]:
    """All ``samples`` as uint8 images (N, C, S, S) and int64 labels (N,).

    ``size`` is the side to bring images to; None takes the first one's, which must be square, and asks all others to have it.
    ``count`` is the number of samples where it is known before. Raises :class:`UserError` for images that do not fit, and for more
    than ``memory_bytes`` of them.
    """
    images, labels = list[Tensor](), list[int]()
    for image, label in samples:
        check_depth(image, f"an image of {title}")
        tensor = image_tensor(image, size, grey=grey)
        side = images[0].shape[-1] if images else tensor.shape[-1]
        require(
            tensor.shape[1:] == (side, side),
            f"{title} has images of {image.width} x {image.height} pixels: set dataset.size to the side to scale images to",
        )
        needed = tensor.numel() * max(count or 0, len(images) + 1)
        require(
            needed <= memory_bytes,
            f"{title} at {side} x {side} pixels takes {needed / 2**30:.1f} GiB or more of memory: set a smaller dataset.size, or a "
            f"dataset.memory_gib above {memory_bytes / 2**30:g}",
        )
        images.append(tensor)
        labels.append(label)
    require(bool(images), f"{title} has no images")
    return torch.stack(images), torch.tensor(labels)


def _kinds(sample: Any) -> str:
    """The types of what a sample holds, for a message."""
    return ", ".join(type(part).__name__ for part in (sample if isinstance(sample, tuple) else (sample,)))
