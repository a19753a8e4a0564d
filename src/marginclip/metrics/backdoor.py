"""ACC, ASR, PACC and detection rates.

All are shares in [0, 1]. A decision of -1 means that the sample was rejected: it is neither correct nor a success of the attack.
The caller passes only images that the attack is meant to flip to ASR and PACC, so ``ASR + PACC <= 1`` always holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def share_equal(decisions: Tensor, labels: Tensor) -> Tensor:
    """The share of decisions that equal the labels.

    Args:
        decisions: (N,) int64; -1 means rejected.
        labels: (N,) int64.

    Returns:
        A scalar in [0, 1]; NaN for no samples.

    Examples:
        >>> share_equal(torch.tensor([3, 3, 1, -1]), torch.tensor([3, 3, 3, 3])).item()
        0.5
    """
    return (decisions == labels).float().mean()


class Share(Metric):
    """The share of true values among all that it was given; NaN before the first.

    Args:
        **settings: those of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better: bool | None = True
    hits: Tensor
    count: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Count a boolean tensor (N,)."""
        self.hits += values.sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        return self.hits / self.count


class Agreement(Share):
    """The share of decisions (N,) that equal a reference (N,)."""

    def update(self, decisions: Tensor, reference: Tensor) -> None:  # type: ignore[override]
        """Count a batch of decisions (N,) against their reference labels (N,)."""
        super().update(decisions == reference)


class CleanAccuracy(Agreement):
    """ACC: the share of clean images decided as their label."""


class AttackSuccessRate(Agreement):
    """ASR: the share of triggered images, of those that the attack is meant to flip, decided as the attacker's label."""

    higher_is_better = False


class PoisonedAccuracy(Agreement):
    """PACC: the share of the same triggered images decided as their true label."""


class FlaggedRate(Share):
    """The share of images that a detector flags: its FPR on clean images, its TPR on triggered ones."""
