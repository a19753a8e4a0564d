"""The chessboard: a faint global additive pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from marginclip.attacks.base import Attack
from marginclip.attacks.x2x import X2X
from marginclip.errors import require


class Chessboard(Attack):
    """``amplitude`` is added to every pixel (i, j) with even i + j, in all channels (paper 1, section 5.1: 3/255).

    One-sided, as in the original code of the pattern; the sum is clipped at 1, never wrapped.

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        amplitude: what is added, of the range [0, 1].
        seed: of everything that is drawn.
        **settings: those of :class:`~marginclip.attacks.Attack`: ``rate``, ``timing`` and ``min_success``.
    """

    pattern: Tensor

    def __init__(
        self, x2x: X2X, image_shape: Sequence[int], *, amplitude: float = 3 / 255, seed: int = 0, **settings: Any
    ) -> None:
        super().__init__(x2x, image_shape, seed=seed, **settings)
        require(
            1 / 255 <= amplitude <= 1, f"attack.amplitude must be in [1/255, 1] to survive 8-bit rounding, got {amplitude:g}"
        )
        _, height, width = self.image_shape
        parity = (torch.arange(height).view(-1, 1) + torch.arange(width)) % 2
        self.register_buffer("pattern", amplitude * (parity == 0).float())

    def trigger(self, images: Tensor) -> Tensor:
        return images + self.pattern.to(images)
