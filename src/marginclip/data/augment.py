"""Batched augmentation on the device: a padded random crop and a horizontal flip, drawn for each image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from marginclip.devices import send
from marginclip.errors import require


class Augment:
    """Pad by ``crop_padding`` zeros, cut a random window of the old size, flip half of the images when ``flip``."""

    def __init__(self, *, crop_padding: int = 0, flip: bool = False) -> None:
        require(
            isinstance(crop_padding, int), f"dataset.augment.crop_padding must be a whole number of pixels, got {crop_padding}"
        )
        require(crop_padding >= 0, f"dataset.augment.crop_padding must not be negative, got {crop_padding}")
        require(isinstance(flip, bool), f"dataset.augment.flip must be true or false, got {flip!r}")
        self.crop_padding, self.flip = crop_padding, flip

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
        if self.flip:
            flipped = send(torch.rand(count, generator=generator) < 0.5, images.device)
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
        return images
