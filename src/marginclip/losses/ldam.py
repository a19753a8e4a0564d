"""LDAM with deferred re-weighting (Cao et al., NeurIPS 2019): larger margins, and later larger weights, for rare classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.devices import send
from marginclip.errors import require
from marginclip.losses.base import Loss, Network, SecondStage
from marginclip.losses.cosine import with_cosine_head


def ldam_margins(class_counts: Tensor, *, largest: float) -> Tensor:
    """Margins (K,), in cosines, in proportion to ``n_j^(-1/4)`` of the images of every class; ``largest`` is the rarest class's."""
    margins = class_counts.double().pow(-0.25)
    return (margins * largest / margins.max()).float()


def effective_weights(class_counts: Tensor, *, beta: float) -> Tensor:
    """Weights (K,) in proportion to ``(1 - beta) / (1 - beta^n_j)``, with the sum K (Cui et al. 2019); ``beta`` 0: all equal."""
    weights = (1 - beta) / (1 - torch.as_tensor(beta, dtype=torch.double) ** class_counts.double())
    return (weights * len(weights) / weights.sum()).float()


class LDAM(Loss):
    """Cross entropy of a cosine classifier whose label's logit is lowered by ``scale`` times :func:`ldam_margins`.

    Later images are weighted by :func:`effective_weights` of their class, and the mean is over the weights, as published.

    Args:
        scale: of the cosine classifier.
        largest_margin: margin of the rarest class, in cosines.
        beta: of the weights.
        reweight_from: share of the epochs from which on images are weighted. 1: never.
        second_stage: as in :class:`Loss`.

    Raises:
        UserError: for numbers out of range.
    """

    cosine = True

    def __init__(
        self,
        *,
        scale: float = 30.0,
        largest_margin: float = 0.5,
        beta: float = 0.9999,
        reweight_from: float = 0.8,
        second_stage: SecondStage | None = None,
    ) -> None:
        super().__init__(second_stage=second_stage)
        require(0 < scale < float("inf"), f"loss=ldam: scale must be positive, got {scale:g}")
        require(0 <= largest_margin <= 2, f"loss=ldam: largest_margin must be in [0, 2], got {largest_margin:g}")
        require(0 <= beta < 1, f"loss=ldam: beta must be in [0, 1), got {beta:g}")
        require(0 <= reweight_from <= 1, f"loss=ldam: reweight_from must be a share in [0, 1], got {reweight_from:g}")
        self.scale, self.largest_margin, self.beta, self.reweight_from = scale, largest_margin, beta, reweight_from
        self.margins: Tensor | None = None
        self.weights: Tensor | None = None
        self.reweighted = False

    def adapt(self, model: nn.Module, class_counts: Tensor) -> nn.Module:
        """A copy of ``model`` with a cosine classifier of this loss's scale."""
        require(int(class_counts.min()) >= 1, "loss=ldam needs a training image of every class")
        self.margins = ldam_margins(class_counts, largest=self.largest_margin)
        self.weights = effective_weights(class_counts, beta=self.beta)
        return self.head(model, len(class_counts))

    def head(self, model: nn.Module, num_classes: int) -> nn.Module:
        """A copy of ``model`` with a cosine classifier of this loss's scale."""
        return with_cosine_head(model, num_classes, scale=self.scale)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        self.reweighted = epoch >= round(self.reweight_from * epochs)

    def __call__(self, model: Network, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        assert self.margins is not None and self.weights is not None, "the loss is adapted to a model before it is used"
        logits = model(images).float()
        self.margins, self.weights = send(self.margins, logits.device), send(self.weights, logits.device)
        margins = F.one_hot(labels, logits.shape[1]) * self.margins
        weights = self.weights if self.reweighted else None
        return F.cross_entropy(logits - self.scale * margins, labels, weight=weights)
