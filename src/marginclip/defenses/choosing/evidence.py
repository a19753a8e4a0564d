"""Which fault a model of unknown history shows on a clean set, and which repair to keep: the statistics, the rule and its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from marginclip.errors import require
from marginclip.maxmargin.mmbd import MaximumMargins


def sign_test(more: int, fewer: int) -> float:
    """The chance of at least ``more`` heads in ``more + fewer`` tosses of a fair coin, exact: the one-sided McNemar test.

    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages" (Psychometrika 1947), in
    its exact form.
    """
    tosses = more + fewer
    return float(sum(math.comb(tosses, better) for better in range(more, tosses + 1)) / 2**tosses)


@dataclass(frozen=True)
class Paired:
    """Two yes-or-no answers about the same ``total`` images: ``more`` turn from no to yes, ``fewer`` from yes to no."""

    more: int
    fewer: int
    total: int

    @property
    def change(self) -> float:
        """By how much the share of yes rises, in [-1, 1]."""
        return (self.more - self.fewer) / self.total

    @property
    def rise_p_value(self) -> float:
        """How likely as many turn to yes when both directions are alike."""
        return sign_test(self.more, self.fewer)

    @property
    def fall_p_value(self) -> float:
        """How likely as many turn to no when both directions are alike."""
        return sign_test(self.fewer, self.more)

    def rises(self, alpha: float, least: float = 0.0) -> bool:
        """Whether the share of yes rises by at least ``least``, significantly so at the level ``alpha``."""
        return self.rise_p_value <= alpha and self.change >= least

    def falls(self, alpha: float, least: float = 0.0) -> bool:
        """Whether the share of yes falls by at least ``least``, significantly so at the level ``alpha``."""
        return self.fall_p_value <= alpha and -self.change >= least


def compare(before: Tensor, after: Tensor) -> Paired:
    """Count how bool answers ``before`` and ``after`` (N,) about the same images differ."""
    return Paired(int((~before & after).sum()), int((before & ~after).sum()), len(before))


@dataclass(frozen=True)
class Evidence:
    """What a model shows on its clean set.

    ``mmom`` and ``mmac`` compare whether each image is decided correctly, by the model and by a repair that never saw the image;
    ``mmac`` is None where nothing asks for it. ``margins`` is MM-BD's verdict on the model. ``suspect`` compares whether each image
    *is* of MM-BD's suspect class with whether it is *decided* for: ``more`` are wrongly decided for it, ``fewer`` are missed.
    """

    mmom: Paired
    margins: MaximumMargins
    suspect: Paired
    mmac: Paired | None = None


@dataclass(frozen=True)
class Decision:
    """The repair to ``keep``, ``mmac``, ``mmom`` or ``none``, and the ``reason`` in one sentence."""

    keep: str
    reason: str


@dataclass(frozen=True)
class Rule:
    """Decides by tests at the level ``alpha``.

    MMOM must raise the accuracy by ``min_gain``; MMAC must not lower it by ``max_cost``; both are shares of the clean set. A
    class is over-predicted where the images wrongly decided for it outnumber its missed images. Where two classes are alike (cats
    and dogs), a model of balanced images errs in both directions; only imbalance favours one.
    """

    alpha: float = 0.05
    min_gain: float = 0.01
    max_cost: float = 0.05

    def __post_init__(self) -> None:
        require(0 < self.alpha < 1, f"defense.alpha must be in (0, 1), got {self.alpha:g}")
        require(0 <= self.min_gain < 1, f"defense.min_gain must be in [0, 1), got {self.min_gain:g}")
        require(0 <= self.max_cost <= 1, f"defense.max_cost must be in [0, 1], got {self.max_cost:g}")

    def imbalanced(self, evidence: Evidence) -> bool:
        """Whether MMOM gains what imbalance or over-training had cost."""
        return evidence.mmom.rises(self.alpha, self.min_gain)

    def wants_mmac(self, evidence: Evidence) -> bool:
        """Whether there is a suspect class whose large margin imbalance does not explain."""
        explained = self.imbalanced(evidence) and evidence.suspect.rises(self.alpha)
        return evidence.margins.detected and not explained

    def decide(self, evidence: Evidence) -> Decision:
        """The repair to keep; ``evidence.mmac`` must be there where :meth:`wants_mmac`."""
        if not self.wants_mmac(evidence):
            return self._without_backdoor(evidence)
        assert evidence.mmac is not None
        return self._with_backdoor(evidence, evidence.mmac)

    def _without_backdoor(self, evidence: Evidence) -> Decision:
        gain, suspicion = f"out of fold MMOM {_moves(evidence.mmom)}", _suspicion(evidence)
        if not self.imbalanced(evidence):
            asked = f"{100 * self.min_gain:g} and p <= {self.alpha:g} are asked for"
            return Decision("none", f"no fault shows: {gain}, where {asked}, and {suspicion}")
        if not evidence.margins.detected:
            return Decision("mmom", f"imbalance or over-training shows: {gain}, and {suspicion}")
        return Decision(
            "mmom", f"imbalance or over-training shows: {gain}; {suspicion}, but that class is over-predicted ({_errors(evidence)}), "
            "which explains its large margin"
        )  # fmt: skip

    def _with_backdoor(self, evidence: Evidence, mmac: Paired) -> Decision:
        imbalanced, suspicion = self.imbalanced(evidence), _suspicion(evidence)
        cost, gain = f"out of fold MMAC {_moves(mmac)}", f"MMOM {_moves(evidence.mmom)}"
        if not mmac.falls(self.alpha, self.max_cost):
            besides = "MMOM would also have gained" if imbalanced else "MMOM does not gain enough"
            found = f"a backdoor shows: {suspicion}, and imbalance does not explain it ({_errors(evidence)})"
            return Decision("mmac", f"{found}; {cost}; {besides}: it {_moves(evidence.mmom)}")
        refused = f"{suspicion}, but MMAC costs too much: {cost}"
        if imbalanced:
            return Decision("mmom", f"{refused}; {gain}, which does not rule a backdoor out")
        return Decision("none", f"{refused}; {gain}; the model is left as it is and may have a backdoor")


def _moves(accuracy: Paired) -> str:
    p_value = accuracy.rise_p_value if accuracy.change >= 0 else accuracy.fall_p_value
    return f"moves the accuracy on {accuracy.total} clean images by {100 * accuracy.change:+.1f} points (p = {p_value:.2g})"


def _suspicion(evidence: Evidence) -> str:
    margins = evidence.margins
    found = f"finds a backdoor to class {margins.suspect}" if margins.detected else "finds no backdoor"
    return f"MM-BD {found} (p = {margins.p_value:.2g})"


def _errors(evidence: Evidence) -> str:
    suspect, label = evidence.suspect, evidence.margins.suspect
    return f"{suspect.more} images wrongly decided for class {label}, {suspect.fewer} missed, p = {suspect.rise_p_value:.2g}"
