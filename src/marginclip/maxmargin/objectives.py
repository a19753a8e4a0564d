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
    """A loss with its two terms, all scalars: ``loss = data + lambda * margin``.

    Args:
        loss: what is minimised.
        data: the data term.
        margin: the margin term, or what else is penalised in its place.
    """

    loss: Tensor
    data: Tensor
    margin: Tensor


def mmac(
    bounded_logits: Tensor, clean_logits: Tensor, margins: Tensor, lambda_: float, *, reduction: str = "mean"
) -> Objective:
    """The MMAC objective (Eq. 3): stay close to the model's logits on clean images, and lower the maximum margins.

    The data term is the mean over images *and* classes of the squared difference.

    Args:
        bounded_logits: of clean images under bounds, (B, K).
        clean_logits: of the same images without bounds, (B, K).
        margins: of the margin inputs of all classes on the bounded network, (N,) in logits.
        lambda_: lambda, the weight of the margin term.
        reduction: of the margin term over the margin inputs: ``mean`` (the paper) or ``sum`` (the published script, whose
            lambda is N times smaller for the same effect).

    Returns:
        The loss and its two terms.

    Raises:
        UserError: for another reduction.
    """
    data, term = F.mse_loss(bounded_logits.float(), clean_logits.float()), _reduced(margins, reduction)
    return Objective(data + lambda_ * term, data, term)


def margin_hinge(margins: Tensor, kappa: float, *, reduction: str = "mean", largest: int | None = None) -> Tensor:
    """What margins (N,) exceed ``-kappa`` by, in logits, averaged or summed: only inputs that their class wins, or nearly, count.

    The plain mean of Eq. 3 can be lowered by making lost inputs lose by more, which limits no maximum margin. ``largest`` is how many
    of the margins count at most, the largest ones; None: all.

    >>> margin_hinge(torch.tensor([-9.0, 5.0, 1.0, -0.5]), kappa=1.0).item()
    2.125
    >>> margin_hinge(torch.tensor([-9.0, 5.0, 1.0, -0.5]), kappa=1.0, largest=2).item()
    4.0
    """
    if largest is not None and len(margins) > largest:
        margins = margins.topk(largest).values
    return _reduced(F.relu(margins.float() + kappa), reduction)


def kl_divergence(bounded_logits: Tensor, clean_logits: Tensor) -> Tensor:
    """The mean divergence KL(model || bounded network) of the class probabilities that these logits, both (B, K), stand for, in nats.

    It is 0 where the bounds change no probability, so unlike the cross entropy it does not ask for more certainty than the model had;
    and unlike a difference of logits it does not ask for their size.

    >>> kl_divergence(torch.tensor([[9.0, 0.0]]), torch.tensor([[9.0, 0.0]])).item()
    0.0
    """
    bounded, clean = bounded_logits.float().log_softmax(1), clean_logits.float().log_softmax(1)
    return F.kl_div(bounded, clean, reduction="batchmean", log_target=True)


def distillation(bounded_logits: Tensor, clean_logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of logits under bounds (B, K) with the mean of the labels (B,) and of the model's class probabilities, in nats.

    Hard and soft targets by halves (Hinton, Vinyals and Dean 2015, section 2), at temperature 1. ``clean_logits`` (B, K) are the model's.

    >>> round(distillation(torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, 0.0]]), torch.tensor([0])).item(), 4)  # log 2
    0.6931
    """
    hard = F.one_hot(labels, bounded_logits.shape[1])
    return F.cross_entropy(bounded_logits.float(), (hard + clean_logits.float().softmax(1)) / 2)


def mmbm(bounded_logits: Tensor, clean_logits: Tensor, bounds: Sequence[Tensor], lambda_: float) -> Objective:
    """The MMBM objective (Wang et al. 2022): stay close to the model's logits on clean images, with small bounds.

    No margin is computed.

    Args:
        bounded_logits: of clean images under bounds, (B, K).
        clean_logits: of the same images without bounds, (B, K).
        bounds: a tensor (channels,) for the upper bounds of each bounded activation, and one for its lower bounds where it has
            such.
        lambda_: lambda, the weight of the sum of the bounds' Euclidean lengths.

    Returns:
        The loss and its two terms; the sum stands in the place of the margin term.
    """
    data = F.mse_loss(bounded_logits.float(), clean_logits.float())
    term = torch.stack([bound.float().norm() for bound in bounds]).sum()
    return Objective(data + lambda_ * term, data, term)


def mmom(bounded_logits: Tensor, labels: Tensor, margins: Tensor, lambda_: float, *, reduction: str = "mean") -> Objective:
    """The MMOM objective (paper 2, Eq. 5): classify a balanced clean set well, and lower the maximum margins.

    The data term is the cross entropy.

    Args:
        bounded_logits: of clean images under bounds, (B, K).
        labels: of the same images, (B,) int64 in [0, K).
        margins: of the margin inputs on the bounded network, equally many for each class, (N,) in logits.
        lambda_: lambda, the weight of the margin term.
        reduction: of the margin term: ``mean`` over classes and their inputs (the paper) or ``sum`` (whose lambda is N times
            smaller for the same effect).

    Returns:
        The loss and its two terms.

    Raises:
        UserError: for another reduction.
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
    """What bound learning knows at a step.

    Args:
        bounded_logits: of clean images under bounds, (B, K).
        clean_logits: of the same images without bounds, (B, K).
        labels: of the same images, (B,) int64 in [0, K).
        margins: of the margin inputs on the bounded network, (N,) in logits; N = 0 where the objective needs none.
        bounds: all upper and lower bounds, each a tensor (channels,).
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


DATA_TERMS = ("cross_entropy", "distillation", "kl_divergence", "squared_error")
MARGIN_TERMS = ("hinge", "signed")


@dataclass(frozen=True)
class MMACObjective:
    """A data term plus lambda times a margin term; ``squared_error`` with ``signed`` is Eq. 3 of the MMAC paper (:func:`mmac`).

    Args:
        data: the data term: the ``cross_entropy`` with the labels, the ``kl_divergence`` from the model's own class probabilities to
            those under bounds, the ``distillation``, which takes both by halves (:func:`distillation`), or the ``squared_error``
            against the model's own logits. The divergence costs less accuracy, but left half of a WaNet backdoor alive
            (docs/results/mmac.md). The squared error wants the large logits back that an attack has caused, and so wide bounds.
        penalty: the margin term: the ``hinge`` of :func:`margin_hinge`, or the ``signed`` margins.
        kappa: of the hinge, a finite number of logits: margin inputs count where their margin exceeds -kappa. Without effect on
            ``signed``.
        reduction: of the margin term over the margin inputs: ``mean`` or ``sum``.
        largest: how many margin inputs count in the hinge, those of the largest margins: over all inputs, an attacked class
            weighs the less the more classes there are. None: all. Without effect on ``signed``.

    Raises:
        UserError: for a setting that is not one of these.
    """

    data: str = "cross_entropy"
    penalty: str = "hinge"
    kappa: float = 1.0
    reduction: str = "mean"
    largest: int | None = 10
    ascends = True
    correct_only = True

    def __post_init__(self) -> None:
        for key, allowed in (("data", DATA_TERMS), ("penalty", MARGIN_TERMS)):
            value = getattr(self, key)
            require(value in allowed, f"defense.objective.{key} must be one of {', '.join(allowed)}, got '{value}'")
        require(math.isfinite(self.kappa), f"defense.objective.kappa must be a finite number of logits, got {self.kappa}")
        _check_reduction(self.reduction)
        require(
            self.largest is None or self.largest >= 1,
            f"defense.objective.largest must be at least 1 or null, got {self.largest}",
        )

    def __call__(self, step: Measured, lambda_: float) -> Objective:
        if self.data == "cross_entropy":
            data = F.cross_entropy(step.bounded_logits.float(), step.labels)
        elif self.data == "distillation":
            data = distillation(step.bounded_logits, step.clean_logits, step.labels)
        elif self.data == "kl_divergence":
            data = kl_divergence(step.bounded_logits, step.clean_logits)
        else:
            data = F.mse_loss(step.bounded_logits.float(), step.clean_logits.float())
        if self.penalty == "hinge":
            term = margin_hinge(step.margins, self.kappa, reduction=self.reduction, largest=self.largest)
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
    """:func:`mmom`, of all clean images, also those that the model gets wrong.

    Args:
        reduction: of the margin term over the margin inputs: ``mean`` or ``sum``.

    Raises:
        UserError: for another reduction.
    """

    reduction: str = "mean"
    ascends = True
    correct_only = False

    def __post_init__(self) -> None:
        _check_reduction(self.reduction)

    def __call__(self, step: Measured, lambda_: float) -> Objective:
        return mmom(step.bounded_logits, step.labels, step.margins, lambda_, reduction=self.reduction)
