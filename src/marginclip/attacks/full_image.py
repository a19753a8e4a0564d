"""Triggers that change the whole image: a sinusoid, a blended pattern, a smooth pattern of low frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from marginclip.attacks.base import Attack
from marginclip.attacks.x2x import X2X
from marginclip.errors import require


class Sinusoid(Attack):
    """``amplitude * sin(2 pi frequency j / W)`` is added to column j of every row and channel (SIG; Barni, Kallas and Tondi 2019).

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        amplitude: height of the wave (published: 20/255).
        frequency: waves across the image (published: 6).
        relabel: True poisons the classes to flip and changes their labels, as the other attacks do. False poisons as published: images of
            the target class alone, with their true label; needs all2one.
        seed: of everything that is drawn.
        **settings: those of :class:`~marginclip.attacks.Attack`: ``rate``, ``timing`` and ``min_success``.
    """

    pattern: Tensor

    def __init__(
        self,
        x2x: X2X,
        image_shape: Sequence[int],
        *,
        amplitude: float = 20 / 255,
        frequency: float = 6.0,
        relabel: bool = True,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(x2x, image_shape, seed=seed, **settings)
        _check_amplitude(amplitude)
        _, height, width = self.image_shape
        require(0 < frequency <= width / 2, f"attack.frequency must be in (0, {width / 2:g}] waves an image, got {frequency:g}")
        require(isinstance(relabel, bool), f"attack.relabel must be true or false, got {relabel!r}")
        require(
            relabel or (x2x.target is not None and not x2x.one_source),
            f"attack.relabel=false needs x2x=all2one: all poisoned images are of one target class; got x2x={x2x.name}",
        )
        self.relabel = relabel
        wave = amplitude * torch.sin(2 * math.pi * frequency * torch.arange(width) / width)
        self.register_buffer("pattern", wave.expand(height, width).clone())

    def trigger(self, images: Tensor) -> Tensor:
        return images + self.pattern.to(images)

    def poisoned_mask(self, labels: Tensor) -> Tensor:
        """As every attack, or ``rate`` of the target class, where no label is changed."""
        return super().poisoned_mask(labels) if self.relabel else self.target_mask(labels)


class BlendFull(Attack):
    """A random image is mixed into the whole image: ``(1 - ratio) x + ratio pattern`` (Chen et al. 2017; ratio 0.2 in training).

    The pattern is uniform on {0, ..., 255}/255 at every pixel and channel, the second of the two patterns that the paper shows.

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        ratio: share of the pattern.
        seed: of everything that is drawn.
        **settings: those of :class:`~marginclip.attacks.Attack`: ``rate``, ``timing`` and ``min_success``.
    """

    pattern: Tensor

    def __init__(self, x2x: X2X, image_shape: Sequence[int], *, ratio: float = 0.2, seed: int = 0, **settings: Any) -> None:
        super().__init__(x2x, image_shape, seed=seed, **settings)
        require(0 < ratio <= 1, f"attack.ratio must be in (0, 1], got {ratio:g}")
        self.ratio = ratio
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("pattern", torch.randint(0, 256, self.image_shape, generator=generator) / 255)

    def trigger(self, images: Tensor) -> Tensor:
        return torch.lerp(images, self.pattern.to(images), self.ratio)


class LowFrequency(Attack):
    """A random smooth pattern is added, made of the lowest spatial frequencies alone.

    Each channel is a sum of cosines ``cos(pi u (2 i + 1) / 2H) cos(pi v (2 j + 1) / 2W)`` for u, v below ``frequencies``, u + v > 0, with
    normal weights. It has no part of high frequency, by which many triggers can be told from images (Zeng et al., ICCV 2021). They optimise
    their smooth pattern against a network; this one is drawn.

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        amplitude: largest absolute value of the pattern.
        frequencies: cosines along each side.
        seed: of everything that is drawn.
        **settings: those of :class:`~marginclip.attacks.Attack`: ``rate``, ``timing`` and ``min_success``.
    """

    pattern: Tensor

    def __init__(
        self,
        x2x: X2X,
        image_shape: Sequence[int],
        *,
        amplitude: float = 16 / 255,
        frequencies: int = 4,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(x2x, image_shape, seed=seed, **settings)
        _check_amplitude(amplitude)
        channels, height, width = self.image_shape
        require(
            isinstance(frequencies, int) and 2 <= frequencies <= min(height, width),
            f"attack.frequencies must be a whole number in 2..{min(height, width)}, got {frequencies}",
        )
        weights = torch.randn(channels, frequencies, frequencies, generator=torch.Generator().manual_seed(seed))
        weights[:, 0, 0] = 0
        pattern = _cosines(frequencies, height).T @ weights @ _cosines(frequencies, width)
        self.register_buffer("pattern", amplitude * pattern / pattern.abs().max())

    def trigger(self, images: Tensor) -> Tensor:
        return images + self.pattern.to(images)


def _cosines(count: int, size: int) -> Tensor:
    """The first ``count`` rows of the discrete cosine transform of ``size`` points, (count, size)."""
    places = (2 * torch.arange(size) + 1) / (2 * size)
    return torch.cos(math.pi * torch.arange(count).unsqueeze(1) * places)


def _check_amplitude(amplitude: float) -> None:
    require(1 / 255 <= amplitude <= 1, f"attack.amplitude must be in [1/255, 1] to survive 8-bit rounding, got {amplitude:g}")
