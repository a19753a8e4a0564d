"""Batched augmentation on the device: a padded random crop, a rotation and a horizontal flip, drawn for each image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from marginclip.devices import send
from marginclip.errors import require


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Augment:
    """Augments a batch: a padded random crop, then a rotation, then a horizontal flip, drawn for each image.

    Args:
        crop_padding: pixels of zeros put on every side, before a random window of the old size is cut out. 0: no crop.
        flip: whether half of the images are flipped.
        rotation: half of the images are turned by an angle between minus this and this, in degrees, in (0, 180]. None: none is.

    Raises:
        UserError: for a setting of another kind or outside its range.
    """

    def __init__(self, *, crop_padding: int = 0, flip: bool = False, rotation: float | None = None) -> None:
        require(
            isinstance(crop_padding, int) and not isinstance(crop_padding, bool),
            f"dataset.augment.crop_padding must be a whole number of pixels, got {crop_padding}",
        )
        require(crop_padding >= 0, f"dataset.augment.crop_padding must not be negative, got {crop_padding}")
        require(isinstance(flip, bool), f"dataset.augment.flip must be true or false, got {flip!r}")
        require(
            rotation is None or (_is_number(rotation) and 0 < rotation <= 180),
            f"dataset.augment.rotation must be null or in (0, 180] degrees, got {rotation}",
        )
        self.crop_padding, self.flip, self.rotation = crop_padding, flip, rotation

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """New images of the same shape (N, C, H, W); ``generator`` is a CPU generator, the only source of randomness."""
        count, _, height, width = images.shape
        padding = self.crop_padding
        if padding:
            shifts = send(torch.randint(0, 2 * padding + 1, (2, count), generator=generator), images.device)
            padded = F.pad(images, (padding,) * 4)
            rows = shifts[0].view(-1, 1) + torch.arange(height, device=images.device)
            columns = shifts[1].view(-1, 1) + torch.arange(width, device=images.device)
            batch = torch.arange(count, device=images.device).view(-1, 1, 1)
            # Advanced indices around a slice come out first: (N, H, W, C), which is channels-last already.
            images = padded[batch, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
        if self.rotation is not None:
            drawn = (2 * torch.rand(count, generator=generator) - 1) * math.radians(self.rotation)
            images = rotated(images, send(drawn * (torch.rand(count, generator=generator) < 0.5), images.device))
        if self.flip:
            flipped = send(torch.rand(count, generator=generator) < 0.5, images.device)
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
        return images


def rotated(images: Tensor, angles: Tensor) -> Tensor:
    """Images (N, C, H, W) turned about their centre by ``angles`` (N,) in radians, anticlockwise; outside is black."""
    _, _, height, width = images.shape
    cosine, sine, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rows = torch.stack([cosine, -sine * height / width, zero, sine * width / height, cosine, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
