"""The scalar objectives whose minimisers are the bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from marginclip.errors import require


@dataclass(frozen=True)
class Objective:
    """A loss with its two terms: ``loss = data + penalty * margin``."""

    loss: Tensor
    data: Tensor
    margin: Tensor


def mmac(
    bounded_logits: Tensor, clean_logits: Tensor, margins: Tensor, penalty: float, *, reduction: str = "mean"
) -> Objective:
    """The MMAC objective (Eq. 3): stay close to the model's logits on clean images, and lower the maximum margins.

    ``bounded_logits`` and ``clean_logits`` (B, K) of the same clean images, with and without bounds; ``margins`` (N,) of the
    margin inputs of all classes on the bounded network; ``penalty`` is lambda. The data term is the mean over images *and*
    classes of the squared difference. ``reduction`` of the margin term: ``mean`` (the paper) or ``sum`` (the published script,
    whose lambda is N times smaller for the same effect).
    """
    require(reduction in ("mean", "sum"), f"defense.reduction must be 'mean' or 'sum', got '{reduction}'")
    data = F.mse_loss(bounded_logits.float(), clean_logits.float())
    term = margins.float().mean() if reduction == "mean" else margins.float().sum()
    return Objective(data + penalty * term, data, term)
