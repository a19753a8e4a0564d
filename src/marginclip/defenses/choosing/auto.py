"""The automatic choice: which repair, if any, a model of unknown fault needs, told from the clean set alone."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from marginclip.defenses.base import Defense, RepairResult, TrainerFactory, with_gradients
from marginclip.defenses.choosing.evidence import Decision, Evidence, Paired, Rule, compare
from marginclip.defenses.clipping.mmac import MMAC
from marginclip.defenses.clipping.mmom import MMOM
from marginclip.defenses.cross_fitting import cross_fitted_logits
from marginclip.errors import UserError, require
from marginclip.maxmargin import MaximumMargins, MaximumMarginTest
from marginclip.networks.copies import own_copy
from marginclip.networks.logits import check_clean_set, clean_logits
from marginclip.silence import nested_trainers, silent_trainer

log = logging.getLogger(__name__)
Made = TypeVar("Made")
MarginTest = Callable[..., MaximumMargins]
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Auto(Defense):
    """Keeps MMAC where the model seems to have a backdoor, MMOM where imbalance or over-training has cost accuracy, else nothing.

    MM-BD tests the model. The clean set is split into ``folds`` stratified folds. A repair by MMOM, learned without a fold,
    decides the images of that fold; so does one by MMAC where MM-BD asks for it.
    :class:`~marginclip.defenses.choosing.evidence.Rule` decides with ``alpha``, ``min_gain`` and ``max_cost``; the repair that it
    keeps is learned from the whole clean set, and ``none`` gives a copy of the model. All is done on the Trainer's device and in
    its precision.

    Args:
        mmac: makes a new repair by MMAC when it is called with a ``seed``. None: the shipped settings.
        mmom: the same for MMOM.
        detection: the same for the test by MM-BD.
        folds: parts of the clean set; images of one are decided by a repair that was learned from the others.
        alpha: level of the tests, MM-BD's own excepted.
        min_gain: accuracy, as a fraction, that MMOM must gain to be kept.
        max_cost: accuracy, as a fraction, from which on MMAC is refused.
        seed: of everything that is drawn.

    Raises:
        UserError: for a setting outside its range; by ``fit`` where a class has fewer clean images than there are folds, and for
            fewer than 3 classes, which MM-BD cannot compare.
    """

    label = "automatic choice"

    def __init__(
        self,
        *,
        mmac: Callable[..., Defense] | None = None,
        mmom: Callable[..., Defense] | None = None,
        detection: Callable[..., MarginTest] | None = None,
        folds: int = 2,
        alpha: float = 0.05,
        min_gain: float = 0.01,
        max_cost: float = 0.05,
        seed: int = 0,
    ) -> None:
        require(folds >= 2, f"defense.folds must be at least 2, got {folds}")
        self.rule = Rule(alpha=alpha, min_gain=min_gain, max_cost=max_cost)
        self.folds, self.seed = folds, seed
        self.repairs = {
            "mmac": _made("mmac", mmac or MMAC, seed),
            "mmom": _made("mmom", mmom or MMOM, seed),
        }
        make_test: Callable[..., MarginTest] = detection or MaximumMarginTest
        self.margin_test = _made("detection", make_test, seed)

    def check_model(self, model: nn.Module, image: Tensor) -> None:
        """Whether both of its repairs take it."""
        for repair in self.repairs.values():
            repair.check_model(model, image)

    @contextmanager
    def in_proportion(self, share: float, fewest: int | None = None) -> Iterator[None]:
        """See :meth:`Defense.in_proportion`: of both repairs."""
        with ExitStack() as stack:
            for repair in self.repairs.values():
                stack.enter_context(repair.in_proportion(share, fewest))
            yield

    @with_gradients
    def fit(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        make_trainer: TrainerFactory = silent_trainer,
        resume: Path | None = None,
    ) -> RepairResult:
        """See :meth:`Defense.fit`: gathers the evidence, decides, and learns the repair that is kept; that alone can be resumed."""
        logits = clean_logits(model, images)
        check_clean_set(images, labels, logits.shape[1])
        require(
            logits.shape[1] >= 3,
            f"defense=auto compares each class's margin with the others' and needs at least 3 classes, got {logits.shape[1]}; "
            "choose defense=mmac or defense=mmom",
        )
        smallest = int(labels.bincount(minlength=logits.shape[1]).min())
        require(
            smallest >= self.folds,
            f"defense.folds={self.folds} needs at least {self.folds} clean images of every class, got {smallest}: raise clean_per_class",
        )
        clock = Clock()
        given = CleanModel(own_copy(model), images, labels, logits.argmax(1).cpu(), logits.shape[1], make_trainer(1))
        evidence = self.gather(given, clock)
        decision = self.rule.decide(evidence)
        if decision.keep == "none":
            result = RepairResult(given.network)
        else:
            repair = self.repairs[decision.keep]
            result = clock.timed(
                "repair", lambda: repair.fit(given.network, images, labels, make_trainer=make_trainer, resume=resume)
            )
        log.info("defense=auto keeps %s: %s", decision.keep, decision.reason)
        arrays = {"auto/maximum_margins": evidence.margins.statistics} | result.arrays
        return replace(result, findings=_findings(evidence, decision, clock.seconds, result), arrays=arrays)

    def gather(self, given: CleanModel, clock: Clock) -> Evidence:
        """What the model shows on its clean set; MMAC is asked only where MM-BD wants it."""
        margins = clock.timed("detection", lambda: given.maximum_margins(self.margin_test))
        mmom = clock.timed("mmom_out_of_fold", lambda: given.out_of_fold(self.repairs["mmom"], self.folds, self.seed))
        suspect = compare(given.labels.cpu() == margins.suspect, given.decisions == margins.suspect)
        evidence = Evidence(mmom, margins, suspect)
        if not self.rule.wants_mmac(evidence):
            return evidence
        mmac = clock.timed("mmac_out_of_fold", lambda: given.out_of_fold(self.repairs["mmac"], self.folds, self.seed))
        return replace(evidence, mmac=mmac)


@dataclass(frozen=True)
class CleanModel:
    """A copy of the model, the clean set, the model's ``decisions`` (N,) on it, and a Trainer that says where is computed and how."""

    network: nn.Module
    images: Tensor
    labels: Tensor
    decisions: Tensor
    num_classes: int
    trainer: L.Trainer

    def maximum_margins(self, margin_test: MarginTest) -> MaximumMargins:
        """The verdict of MM-BD."""
        network = own_copy(self.network).to(self.trainer.strategy.root_device)
        half = HALF.get(str(self.trainer.precision))
        return margin_test(network, tuple(self.images.shape[1:]), self.num_classes, autocast=half)

    def out_of_fold(self, repair: Defense, folds: int, seed: int) -> Paired:
        """The model's correct decisions against those of repairs that never saw the image."""
        logits = cross_fitted_logits(
            repair, self.network, self.images, self.labels, folds=folds, seed=seed, make_trainer=nested_trainers(self.trainer)
        )
        labels = self.labels.cpu()
        return compare(self.decisions == labels, logits.argmax(1) == labels)


class Clock:
    """Notes the seconds of each part by name; ``progress`` is told the name of a part as it begins."""

    def __init__(self, progress: Callable[[str], None] = lambda part: None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress

    def timed(self, part: str, work: Callable[[], Made]) -> Made:
        """The result of ``work()``."""
        self.progress(part)
        start = time.perf_counter()
        result = work()
        self.seconds[part] = time.perf_counter() - start
        return result


def _made(name: str, factory: Callable[..., Made], seed: int) -> Made:
    """A new object that shares nothing with others from the same factory: a partial's arguments may hold state."""
    try:
        return copy.deepcopy(factory)(seed=seed)
    except UserError as error:
        raise UserError(f"defense.{name}: {error}") from error


def _findings(evidence: Evidence, decision: Decision, seconds: dict[str, float], kept: RepairResult) -> dict[str, Any]:
    """The decision, its reason and everything that it rests on; below ``repair`` what the repair that was kept found."""
    margins, suspect = evidence.margins, evidence.suspect
    return {
        "decision": decision.keep,
        "reason": decision.reason,
        "mmom": _accuracy(evidence.mmom),
        "mmac": None if evidence.mmac is None else _accuracy(evidence.mmac),
        "detection": {"detected": margins.detected, "p_value": margins.p_value, "suspect": margins.suspect},
        "over_prediction": {"wrong": suspect.more, "missed": suspect.fewer, "p_value": suspect.rise_p_value},
        "seconds": seconds,
        "repair": kept.findings,
    }


def _accuracy(change: Paired) -> dict[str, float]:
    return {
        "gain": change.change, "better": change.more, "worse": change.fewer, "images": change.total,
        "p_gain": change.rise_p_value, "p_cost": change.fall_p_value,
    }  # fmt: skip
