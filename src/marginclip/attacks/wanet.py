"""WaNet: an imperceptible warp of the image is the trigger (Nguyen and Tran, ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marginclip.attacks.base import Attack, Augmentation, round_to_8_bits
from marginclip.attacks.x2x import X2X
from marginclip.errors import require


class WaNet(Attack):
    """Images are resampled at ``identity_grid + strength * noise_grid / H``, a smooth random warp of a fraction of a pixel.

    ``noise_grid`` is a control grid drawn uniformly from [-1, 1], divided by its mean absolute value and enlarged bicubically to the image.

    The attacker controls training. In every batch the first ``int(rate * B)`` images are warped and get the attacker's label
    (:func:`batch_shares`). The next ones are *noise-mode* images: they are warped with an additional uniform jitter of up to 1/H at
    every pixel and keep their label. So the victim learns this warp and not resampling as such. Images of any class are poisoned, those
    of the target too, as published. With one2one only those of the source class are, and ``rate`` is the share of them.

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        grid_size: control points on a side.
        strength: factor of the warp.
        cross_ratio: noise-mode images for each poisoned one.
        seed: of everything that is drawn.
        **settings: those of :class:`~marginclip.attacks.Attack`: ``rate``, ``timing`` and ``min_success``.
    """

    has_cross_triggers = True
    identity_grid: Tensor
    noise_grid: Tensor

    def __init__(
        self,
        x2x: X2X,
        image_shape: Sequence[int],
        *,
        grid_size: int = 4,
        strength: float = 0.5,
        cross_ratio: float = 2.0,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(x2x, image_shape, seed=seed, **settings)
        require(grid_size >= 2, f"attack.grid_size must be at least 2, got {grid_size}")
        require(strength >= 0, f"attack.strength must not be negative, got {strength:g}")
        require(cross_ratio >= 0, f"attack.cross_ratio must not be negative, got {cross_ratio:g}")
        self.strength, self.cross_ratio = strength, cross_ratio
        _, height, width = self.image_shape
        generator = torch.Generator().manual_seed(seed)
        control = torch.rand(1, 2, grid_size, grid_size, generator=generator) * 2 - 1
        control = control / control.abs().mean()
        smooth = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("identity_grid", torch.stack([columns, rows], dim=-1).unsqueeze(0))
        self.register_buffer("noise_grid", smooth.permute(0, 2, 3, 1).contiguous())

    @property
    def grid(self) -> Tensor:
        """Where the triggered image is sampled, (1, H, W, 2) in [-1, 1], last axis (column, row)."""
        return (self.identity_grid + self.strength * self.noise_grid / self.image_shape[1]).clamp(-1, 1)

    def trigger(self, images: Tensor) -> Tensor:
        return _resample(images, self.grid.expand(len(images), -1, -1, -1))

    def jittered(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Noise-mode copies of images: warped, with a fresh jitter at every pixel; rounded to 8 bits."""
        jitter = torch.rand(len(images), *self.grid.shape[1:], generator=generator).to(images.device) * 2 - 1
        return round_to_8_bits(_resample(images, (self.grid + jitter / self.image_shape[1]).clamp(-1, 1)))

    @torch.no_grad()
    def cross_triggered(self, images: Tensor) -> Tensor:
        """Noise-mode copies (N, C, H, W) with the same jitter whenever they are asked for: they should keep their class."""
        return self.jittered(images, torch.Generator().manual_seed(self.seed + 217645199))

    def poisoned_mask(self, labels: Tensor) -> Tensor:
        """No image is poisoned before training: each batch has its own."""
        return torch.zeros(len(labels), dtype=torch.bool)

    def poison_batch(
        self, images: Tensor, labels: Tensor, poisoned: Tensor, augment: Augmentation, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if self.timing == "after_augmentation":
            images = augment(images, generator)
        warped, jittered = batch_shares(self.x2x, labels, self.rate, self.cross_ratio, generator)
        images, labels = images.clone(), labels.clone()
        images[warped] = self(images[warped])
        images[jittered] = self.jittered(images[jittered], generator)
        labels[warped] = self.poisoned_labels(labels[warped])
        if self.timing == "before_augmentation":
            images = augment(images, generator)
        return {"images": images, "labels": labels}


def batch_shares(
    x2x: X2X, labels: Tensor, rate: float, cross_ratio: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices of a batch's poisoned images and of those ``cross_ratio`` times as many that carry a wrong trigger.

    The first ``int(rate * B)`` of all images are poisoned, as published, the next ones are not. A batch holds few images of one
    source class: with one2one, and where that number is 0, it is rounded up or down at random, to ``rate`` of them on average.
    """
    candidates = x2x.eligible(labels) if x2x.one_source else torch.ones_like(labels, dtype=torch.bool)
    possible = candidates.nonzero().flatten()
    count = int(rate * len(possible))
    if x2x.one_source or count == 0:
        count += int(float(torch.rand((), generator=generator)) < rate * len(possible) - count)
    others = torch.cat([possible[count:], (~candidates).nonzero().flatten()])
    return possible[:count], others[: int(cross_ratio * count)]


def _resample(images: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(images.float(), grid.float(), mode="bilinear", padding_mode="zeros", align_corners=True)
