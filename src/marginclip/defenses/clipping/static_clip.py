"""Static clipping: bounds at a fixed share of each map's clean maximum, nothing learned. The honest control for MMAC."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses.base import Defense
from marginclip.defenses.clipping.settings import BoundStart
from marginclip.networks.logits import check_clean_set, clean_logits


class StaticClip(Defense):
    """Every bound at ``start``, by default half of what its feature map reaches on the clean set."""

    learns = False

    def __init__(self, *, start: BoundStart | None = None, channel_axis: int | None = None, seed: int = 0) -> None:
        super().__init__()
        del seed  # nothing is random
        self.start, self.channel_axis = start or BoundStart(share=0.5, quantile=1.0), channel_axis
        self.history: list[dict[str, float]] = []

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        check_clean_set(images, labels, clean_logits(model, images[:2]).shape[1])
        self.bounded = BoundedNetwork(model, images[:1], channel_axis=self.channel_axis).to(memory_format=torch.channels_last)
        self.start.apply(self.bounded, images)

    def repaired(self) -> BoundedNetwork:
        return self.bounded
