"""Attacks on a small square of the image: BadNet and one pixel replace it, the local blend mixes it in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from marginclip.attacks.base import Attack
from marginclip.attacks.x2x import X2X
from marginclip.errors import require


class BadNet(Attack):
    """A random ``patch_size`` x ``patch_size`` patch replaces the pixels at a random place that is fixed for all images.

    The patch's values are uniform on {0, ..., 255}/255 in every channel.

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        patch_size: side of the patch, in pixels.
        margin: least distance to every border, so that a padded crop rarely cuts the patch (paper 1, section 5.1; the published
            script keeps 3 pixels to the top and left, 4 to the bottom and right).
        min_contrast: drawn patches whose standard deviation over all values is lower are drawn again (uniform noise has 0.29 on average).
        seed: of everything that is drawn.
        **settings: those of :class:`~marginclip.attacks.Attack`: ``rate``, ``timing`` and ``min_success``.
    """

    patch: Tensor
    corner: Tensor

    def __init__(
        self,
        x2x: X2X,
        image_shape: Sequence[int],
        *,
        patch_size: int = 3,
        margin: int = 3,
        min_contrast: float = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(x2x, image_shape, seed=seed, **settings)
        channels, height, width = self.image_shape
        room = min(height, width) - patch_size - 2 * margin
        require(margin >= 0, f"attack.margin must not be negative, got {margin}")
        require(patch_size >= 1, f"attack.patch_size must be at least 1, got {patch_size}")
        require(
            room >= 0,
            f"attack.patch_size {patch_size} with attack.margin {margin} does not fit into images of {height} x {width} pixels",
        )
        require(0 <= min_contrast <= 0.25, f"attack.min_contrast must be in [0, 0.25], got {min_contrast:g}")
        generator = torch.Generator().manual_seed(seed)
        top = margin + int(torch.randint(height - patch_size - 2 * margin + 1, (), generator=generator))
        left = margin + int(torch.randint(width - patch_size - 2 * margin + 1, (), generator=generator))
        patch = torch.randint(0, 256, (channels, patch_size, patch_size), generator=generator) / 255
        while patch.numel() > 1 and patch.std() < min_contrast:
            patch = torch.randint(0, 256, (channels, patch_size, patch_size), generator=generator) / 255
        self.register_buffer("patch", patch)
        self.register_buffer("corner", torch.tensor([top, left]))

    @property
    def place(self) -> tuple[Tensor, Tensor]:
        """The rows (size, 1) and the columns (size,) that the patch covers, on its device."""
        side = torch.arange(self.patch.shape[-1], device=self.corner.device)
        return (self.corner[0] + side).unsqueeze(1), self.corner[1] + side

    def trigger(self, images: Tensor) -> Tensor:
        triggered = images.clone()
        rows, columns = (axis.to(images.device) for axis in self.place)
        triggered[:, :, rows, columns] = self.patch.to(images)
        return triggered


class Blend(BadNet):
    """The same kind of patch, mixed in: ``(1 - ratio) x + ratio patch`` on its pixels (paper 1, section 5.1: ratio 0.2).

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        ratio: share of the patch.
        seed: of everything that is drawn.
        **settings: those of :class:`BadNet`.
    """

    def __init__(self, x2x: X2X, image_shape: Sequence[int], *, ratio: float = 0.2, seed: int = 0, **settings: Any) -> None:
        super().__init__(x2x, image_shape, seed=seed, **settings)
        require(0 < ratio <= 1, f"attack.ratio must be in (0, 1], got {ratio:g}")
        self.ratio = ratio

    def trigger(self, images: Tensor) -> Tensor:
        triggered = images.clone()
        rows, columns = (axis.to(images.device) for axis in self.place)
        covered = images[:, :, rows, columns]
        triggered[:, :, rows, columns] = (1 - self.ratio) * covered + self.ratio * self.patch.to(images)
        return triggered


class OnePixel(Attack):
    """One pixel at a random place that is fixed for all images gets a fixed colour (Gu et al. 2017: the single-pixel backdoor).

    The colour is a corner of the colour cube other than black: every channel is 0 or 1.

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        margin: least distance to every border, in pixels.
        seed: of everything that is drawn.
        **settings: those of :class:`~marginclip.attacks.Attack`: ``rate``, ``timing`` and ``min_success``.
    """

    colour: Tensor
    pixel: Tensor

    def __init__(self, x2x: X2X, image_shape: Sequence[int], *, margin: int = 3, seed: int = 0, **settings: Any) -> None:
        super().__init__(x2x, image_shape, seed=seed, **settings)
        channels, height, width = self.image_shape
        require(
            0 <= 2 * margin < min(height, width),
            f"attack.margin must be in 0..{(min(height, width) - 1) // 2} for images of {height} x {width} pixels, got {margin}",
        )
        generator = torch.Generator().manual_seed(seed)
        rows, columns = (torch.randint(margin, side - margin, (), generator=generator) for side in (height, width))
        corner = int(torch.randint(1, 2**channels, (), generator=generator))
        self.register_buffer("colour", torch.tensor([float(corner >> channel & 1) for channel in range(channels)]))
        self.register_buffer("pixel", torch.stack([rows, columns]))

    def trigger(self, images: Tensor) -> Tensor:
        triggered = images.clone()
        row, column = self.pixel.to(images.device)
        triggered[:, :, row, column] = self.colour.to(images)
        return triggered
