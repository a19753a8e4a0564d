"""The scalar objectives whose minimisers are the bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from marginclip.errors import require


@dataclass(frozen=True)
class Objective:
    """A loss with its two terms: ``loss = data + lambda * margin``; ``margin`` stands for what is penalised."""

    loss: Tensor
    data: Tensor
    margin: Tensor


def mmac(
    bounded_logits: Tensor, clean_logits: Tensor, margins: Tensor, lambda_: float, *, reduction: str = "mean"
) -> Objective:
    """The MMAC objective (Eq. 3): stay close to the model's logits on clean images, and lower the maximum margins.

    ``bounded_logits`` and ``clean_logits`` (B, K) of the same clean images, with and without bounds; ``margins`` (N,) of the
    margin inputs of all classes on the bounded network; ``lambda_`` is lambda. The data term is the mean over images *and*
    classes of the squared difference. ``reduction`` of the margin term: ``mean`` (the paper) or ``sum`` (the published script,
    whose lambda is N times smaller for the same effect).
    """
    data, term = F.mse_loss(bounded_logits.float(), clean_logits.float()), _reduced(margins, reduction)
    return Objective(data + lambda_ * term, data, term)


def margin_hinge(margins: Tensor, kappa: float, *, reduction: str = "mean") -> Tensor:
    """What margins (N,) exceed ``-kappa`` by, in logits, averaged or summed: only inputs that their class wins, or nearly, count.

    The plain mean of Eq. 3 can be lowered by making lost inputs lose by more, which limits no maximum margin.
    """
    return _reduced(F.relu(margins.float() + kappa), reduction)


def mmbm(bounded_logits: Tensor, clean_logits: Tensor, bounds: Sequence[Tensor], lambda_: float) -> Objective:
    """The MMBM objective (Wang et al. 2022): stay close to the model's logits on clean images, with small bounds.

    ``bounded_logits`` and ``clean_logits`` (B, K) as in :func:`mmac`; ``bounds``, a tensor (channels,) for each bounded
    activation; ``lambda_`` is lambda, the weight of the sum of the bounds' Euclidean lengths. No margin is computed.
    """
    data = F.mse_loss(bounded_logits.float(), clean_logits.float())
    term = torch.stack([bound.float().norm() for bound in bounds]).sum()
    return Objective(data + lambda_ * term, data, term)


def mmom(bounded_logits: Tensor, labels: Tensor, margins: Tensor, lambda_: float, *, reduction: str = "mean") -> Objective:
    """The MMOM objective (paper 2, Eq. 5): classify a balanced clean set well, and lower the maximum margins.

    ``bounded_logits`` (B, K) of clean images and their ``labels`` (B,); ``margins`` (N,) of the margin inputs, equally many for each
    class, on the bounded network; ``lambda_`` is lambda. The data term is the cross entropy. ``reduction`` of the margin term:
    ``mean`` over classes and their inputs (the paper) or ``sum`` (whose lambda is N times smaller for the same effect).
    """
    data, term = F.cross_entropy(bounded_logits.float(), labels), _reduced(margins, reduction)
    return Objective(data + lambda_ * term, data, term)


def _reduced(margins: Tensor, reduction: str) -> Tensor:
    _check_reduction(reduction)
    return margins.float().mean() if reduction == "mean" else margins.float().sum()


def _check_reduction(reduction: str) -> None:
    require(reduction in ("mean", "sum"), f"defense.objective.reduction must be 'mean' or 'sum', got '{reduction}'")


@dataclass(frozen=True)
class Measured:
    """What bound learning knows at a step: ``bounded_logits`` and ``clean_logits`` (B, K) and ``labels`` (B,) of the same clean
    images, ``margins`` (N,) of the margin inputs on the bounded network (none where the objective needs none), and the ``bounds``.
    """

    bounded_logits: Tensor
    clean_logits: Tensor
    labels: Tensor
    margins: Tensor
    bounds: Sequence[Tensor]


class BoundObjective(Protocol):
    """What bound learning minimises, for lambda as ``lambda_``. ``ascends`` says whether it needs margin inputs, which are ascended
    for it only then; ``correct_only`` whether the clean images that the model gets wrong are left out.
    """

    @property
    def ascends(self) -> bool: ...

    @property
    def correct_only(self) -> bool: ...

    def __call__(self, step: Measured, lambda_: float) -> Objective: ...


DATA_TERMS = ("cross_entropy", "squared_error")
MARGIN_TERMS = ("hinge", "signed")


@dataclass(frozen=True)
class MMACObjective:
    """A data term plus lambda times a margin term; ``squared_error`` with ``signed`` is Eq. 3 of the MMAC paper (:func:`mmac`).

    ``data`` is the ``cross_entropy`` with the labels, or the ``squared_error`` against the model's own logits. The latter wants the
    large logits back that an attack has caused, and so wide bounds. ``penalty`` is the ``hinge`` of :func:`margin_hinge` with
    ``kappa``, in logits, or the ``signed`` margins. ``reduction`` of the margin term over the margin inputs: ``mean`` or ``sum``.
    """

    data: str = "cross_entropy"
    penalty: str = "hinge"
    kappa: float = 1.0
    reduction: str = "mean"
    ascends = True
    correct_only = True

    def __post_init__(self) -> None:
        for key, allowed in (("data", DATA_TERMS), ("penalty", MARGIN_TERMS)):
            value = getattr(self, key)
            require(value in allowed, f"defense.objective.{key} must be one of {', '.join(allowed)}, got '{value}'")
        require(math.isfinite(self.kappa), f"defense.objective.kappa must be a finite number of logits, got {self.kappa}")
        _check_reduction(self.reduction)

    def __call__(self, step: Measured, lambda_: float) -> Objective:
        if self.data == "cross_entropy":
            data = F.cross_entropy(step.bounded_logits.float(), step.labels)
        else:
            data = F.mse_loss(step.bounded_logits.float(), step.clean_logits.float())
        if self.penalty == "hinge":
            term = margin_hinge(step.margins, self.kappa, reduction=self.reduction)
        else:
            term = _reduced(step.margins, self.reduction)
        return Objective(data + lambda_ * term, data, term)


@dataclass(frozen=True)
class MMBMObjective:
    """:func:`mmbm`."""

    ascends = False
    correct_only = True

    def __call__(self, step: Measured, lambda_: float) -> Objective:
        return mmbm(step.bounded_logits, step.clean_logits, step.bounds, lambda_)


@dataclass(frozen=True)
class MMOMObjective:
    """:func:`mmom`, with its ``reduction`` of the margins; of all clean images, also those that the model gets wrong."""

    reduction: str = "mean"
    ascends = True
    correct_only = False

    def __post_init__(self) -> None:
        _check_reduction(self.reduction)

    def __call__(self, step: Measured, lambda_: float) -> Objective:
        return mmom(step.bounded_logits, step.labels, step.margins, lambda_, reduction=self.reduction)
