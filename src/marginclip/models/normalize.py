"""Input normalisation as a layer, so that triggers, bounds and margin search all live in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from marginclip.errors import require


class Normalize(nn.Module):
    """Channel-wise ``(x - mean) / std`` of images (N, C, H, W) in [0, 1].

    The statistics are constants of the configuration and stay out of ``state_dict``, so a checkpoint that somebody else
    trained loads under its own keys.

    >>> Normalize(mean=[0.5], std=[0.25])(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)).flatten().tolist()
    [-2.0, 0.0, 2.0]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        require(len(mean) == len(std), f"model.mean and model.std must have the same length, got {len(mean)} and {len(std)}")
        require(all(value > 0 for value in std), f"model.std must be positive, got {list(std)}")
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def make_normalize(in_channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """The layer for ``in_channels`` channels; the identity when neither statistic is given (the papers feed raw [0, 1])."""
    if mean is None and std is None:
        return nn.Identity()
    require(mean is not None and std is not None, "model.mean and model.std must be given together")
    assert mean is not None and std is not None
    require(
        len(mean) == in_channels, f"model.mean must have one value a channel ({in_channels}), got {len(mean)}: {list(mean)}"
    )
    return Normalize(mean, std)
