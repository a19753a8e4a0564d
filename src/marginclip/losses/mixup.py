"""Mixup (Zhang et al., ICLR 2018): training on mixtures of two images and of their labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from marginclip.devices import send
from marginclip.errors import require
from marginclip.losses.base import Loss, Network, SecondStage


def beta_draw(alpha: float, generator: torch.Generator) -> float:
    """One number from Beta(alpha, alpha), in [0, 1]; moves ``generator`` on and no other source of randomness."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):  # torch's Beta takes no generator
        torch.default_generator.manual_seed(seed)
        return float(torch.distributions.Beta(torch.tensor(alpha, dtype=torch.double), alpha).sample())


def mixup(images: Tensor, labels: Tensor, *, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """``share * x + (1 - share) * x'``, with one share ~ Beta(alpha, alpha) a batch and x' another image of the batch.

    images (B, C, H, W) and labels (B,); returns the mixtures, the labels of the x' (B,), and the share.
    """
    share = beta_draw(alpha, generator)
    partner = send(torch.randperm(len(images), generator=generator), images.device)
    return share * images + (1 - share) * images[partner], labels[partner], share


class Mixup(Loss):
    """``share * CE(y) + (1 - share) * CE(y')`` of :func:`mixup` images.

    Args:
        alpha: of the Beta distribution of the shares; 1 draws them evenly.
        second_stage: as in :class:`Loss`.

    Raises:
        UserError: for an ``alpha`` that is not positive.
    """

    def __init__(self, *, alpha: float = 1.0, second_stage: SecondStage | None = None) -> None:
        super().__init__(second_stage=second_stage)
        require(0 < alpha < float("inf"), f"loss=mixup: alpha must be positive, got {alpha:g}")
        self.alpha = alpha

    def __call__(self, model: Network, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        mixed, others, share = mixup(images, labels, alpha=self.alpha, generator=generator)
        logits = model(mixed).float()
        return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, others)
