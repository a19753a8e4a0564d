"""Choosing the strength tau of a post-hoc correction: a number, or the best of a grid on the clean set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from marginclip.errors import require

log = logging.getLogger(__name__)
SCORES = ("accuracy", "nll")


@dataclass(frozen=True)
class TauSearch:
    """The grid 0, ``step``, ... up to ``largest``, and what is best on it. The clean set decides.

    The defaults are the grid of Kang et al. (2020), who choose by the accuracy.

    Args:
        largest: end of the grid.
        step: of the grid.
        by: ``accuracy``, or ``nll``, the mean cross entropy.
    """

    largest: float = 2.0
    step: float = 0.1
    by: str = "accuracy"

    def __post_init__(self) -> None:
        require(0 < self.step < float("inf"), f"defense.search.step must be positive, got {self.step:g}")
        require(
            self.step <= self.largest <= 1000 * self.step,
            f"defense.search.largest must be from one to 1000 steps of {self.step:g}, got {self.largest:g}",
        )
        require(self.by in SCORES, f"defense.search.by must be 'accuracy' or 'nll', got '{self.by}'")

    def grid(self) -> list[float]:
        """Every tau that is tried, in ascending order."""
        return [round(index * self.step, 10) for index in range(int(self.largest / self.step + 1e-9) + 1)]

    def scores(self, corrected: Callable[[float], Tensor], labels: Tensor) -> Tensor:
        """The score (T,) of every tau of the grid, better where higher, from logits ``corrected(tau)`` (N, K) and labels (N,)."""
        return torch.stack([self._score(corrected(tau), labels) for tau in self.grid()])

    def best(self, scores: Tensor) -> float:
        """The tau of the highest of ``scores`` (T,), the smallest such tau where several tie; a warning where it ends the grid."""
        tau = self.grid()[int((scores == scores.max()).nonzero()[0])]
        if tau == self.grid()[-1]:
            log.warning("the best tau, %g, is the last of the grid; raise defense.search.largest", tau)
        return tau

    def _score(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.by == "accuracy":
            return (logits.argmax(1) == labels).double().mean()
        return -F.cross_entropy(logits, labels)


def check_tau(tau: float | str) -> None:
    """Raise :class:`UserError` unless ``tau`` is ``auto`` or a finite number from 0 up."""
    number = isinstance(tau, (int, float)) and not isinstance(tau, bool) and 0 <= tau < float("inf")
    require(number or tau == "auto", f"defense.tau must be a number from 0 up or auto, got {tau!r}")


def chosen_tau(
    tau: float | str, search: TauSearch, corrected: Callable[[float], Tensor], labels: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """``tau`` itself, or for ``auto`` the best of ``search``; and the grid and its scores, for figures, where it was searched.

    ``corrected(tau)`` are logits (N, K) of the clean images with these ``labels`` (N,).
    """
    if not isinstance(tau, str):
        return float(tau), {}
    scores = search.scores(corrected, labels)
    return search.best(scores), {"tau/grid": torch.tensor(search.grid()), "tau/score": scores.float()}
