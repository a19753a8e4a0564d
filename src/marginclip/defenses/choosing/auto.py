"""The automatic choice: which repair, if any, a model of unknown fault needs, told from the clean set alone."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from marginclip.defenses.base import Defense
from marginclip.defenses.choosing.evidence import Decision, Evidence, Paired, Rule, compare
from marginclip.defenses.clipping.bound_learning import BoundLearning
from marginclip.defenses.clipping.settings import AscentPlan, BoundStart
from marginclip.defenses.fit import cross_fitted_logits, fit_defense, quiet_trainer
from marginclip.errors import UserError, require
from marginclip.maxmargin import LambdaController, MaximumMargins, MaximumMarginTest, MMOMObjective
from marginclip.networks.copies import own_copy
from marginclip.networks.logits import check_clean_set, clean_logits

log = logging.getLogger(__name__)
Made = TypeVar("Made")
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Auto(Defense):
    """Keeps MMAC where the model seems to have a backdoor, MMOM where imbalance or over-training has cost accuracy, else nothing.

    MM-BD tests the model; ``folds`` repairs by MMOM, each learned without one stratified fold of the clean set, decide the images
    of that fold, and so do repairs by MMAC where MM-BD asks for it. :class:`~marginclip.defenses.choosing.evidence.Rule` decides with
    ``alpha``, ``min_gain`` and ``max_cost``; the repair that it keeps is learned from the whole clean set, and ``none`` gives a copy
    of the model.

    ``mmac``, ``mmom`` and ``detection`` make a new repair or test when they are called with a ``seed``; None stands for the
    shipped settings. Nested repairs run on the Trainer's device and in its precision. Raises :class:`UserError` where a class has
    fewer clean images than there are folds, and for fewer than 3 classes, which MM-BD cannot compare.
    """

    def __init__(
        self,
        *,
        mmac: Callable[..., Defense] | None = None,
        mmom: Callable[..., Defense] | None = None,
        detection: Callable[..., Callable[..., MaximumMargins]] | None = None,
        folds: int = 2,
        alpha: float = 0.05,
        min_gain: float = 0.01,
        max_cost: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(folds >= 2, f"defense.folds must be at least 2, got {folds}")
        self.rule = Rule(alpha=alpha, min_gain=min_gain, max_cost=max_cost)
        self.folds, self.seed = folds, seed
        self.repairs = {"mmac": mmac or BoundLearning, "mmom": mmom or mmom_repair}
        self.detection: Callable[..., Callable[..., MaximumMargins]] = detection or MaximumMarginTest
        for name, factory in (self.repairs | {"detection": self.detection}).items():
            self._make(name, factory)  # a mistake in their settings shows here, before anything is computed
        self._forget()

    def _forget(self) -> None:
        self.seconds: dict[str, float] = {}
        self.evidence: Evidence | None = None
        self.decision: Decision | None = None
        self.kept: list[Defense] = []  # lists keep modules that the Trainer must not treat as parts of this one

    # -- the defense contract -------------------------------------------------------------------------------------------------

    def check_model(self, model: nn.Module, image: Tensor) -> None:
        """Whether both of its repairs take it."""
        for name, factory in self.repairs.items():
            self._make(name, factory).check_model(model, image)

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Copy the model, and note what it decides for the clean images."""
        self._forget()
        logits = clean_logits(model, images)
        check_clean_set(images, labels, logits.shape[1])
        require(
            logits.shape[1] >= 3,
            f"defense=auto compares each class's margin with the others' and needs at least 3 classes, got {logits.shape[1]}; "
            "choose defense=mmac or defense=mmom",
        )
        smallest = int(labels.bincount(minlength=clean_logits(model, images[:1]).shape[1]).min())
        require(
            smallest >= self.folds,
            f"defense.folds={self.folds} needs at least {self.folds} clean images of every class, got {smallest}: raise clean_per_class",
        )
        self.given, self.images, self.labels = [own_copy(model)], images, labels
        self.decisions, self.num_classes = logits.argmax(1).cpu(), logits.shape[1]

    def batches(self) -> DataLoader[int]:
        """One batch without content: all work is done before it."""
        return DataLoader(range(1), batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]

    @property
    def num_epochs(self) -> int:
        return 1

    def repaired(self) -> nn.Module:
        """The network of the repair that was kept, or a copy of the model."""
        return self.network[0]

    def findings(self) -> dict[str, Any]:
        """The decision, its reason and everything that it rests on; below ``repair`` what the repair that was kept found."""
        if self.decision is None or self.evidence is None:
            return {}
        margins, suspect = self.evidence.margins, self.evidence.suspect
        return {
            "decision": self.decision.keep,
            "reason": self.decision.reason,
            "mmom": _accuracy(self.evidence.mmom),
            "mmac": None if self.evidence.mmac is None else _accuracy(self.evidence.mmac),
            "detection": {"detected": margins.detected, "p_value": margins.p_value, "suspect": margins.suspect},
            "over_prediction": {"wrong": suspect.more, "missed": suspect.fewer, "p_value": suspect.rise_p_value},
            "seconds": self.seconds,
            "repair": self.kept[0].findings() if self.kept else {},
        }

    def arrays(self) -> dict[str, Tensor]:
        """The maximum margin of every class, and what the repair that was kept has to keep."""
        own = {} if self.evidence is None else {"auto/maximum_margins": self.evidence.margins.statistics}
        return own | (self.kept[0].arrays() if self.kept else {})

    @property
    def history(self) -> list[dict[str, float]]:
        """The course of learning of the repair that was kept."""
        return getattr(self.kept[0], "history", []) if self.kept else []

    @property
    def relaxed(self) -> float:
        """How far the bounds that were kept had to be relaxed."""
        return getattr(self.kept[0], "relaxed", 0.0) if self.kept else 0.0

    # -- the examination ------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> None:
        """None: the nested repairs have their own."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing is left to do."""

    def setup(self, stage: str) -> None:
        """Refuse several devices, on which the nested repairs would not agree who does what."""
        count = self.trainer.world_size
        require(count == 1, f"defense=auto runs on one device, got {count}: use trainer=gpu or trainer.devices=1")

    def on_fit_start(self) -> None:
        """Gather the evidence, decide, and learn the repair that is kept."""
        self.evidence = self._gather()
        self.decision = self.rule.decide(self.evidence)
        self.network = [self._timed("repair", self._repair)]
        log.info("defense=auto keeps %s: %s", self.decision.keep, self.decision.reason)

    def _gather(self) -> Evidence:
        margins = self._timed("detection", self._maximum_margins)
        mmom = self._timed("mmom_out_of_fold", lambda: self._out_of_fold("mmom"))
        suspect = compare(self.labels.cpu() == margins.suspect, self.decisions == margins.suspect)
        evidence = Evidence(mmom, margins, suspect)
        if not self.rule.wants_mmac(evidence):
            return evidence
        return replace(evidence, mmac=self._timed("mmac_out_of_fold", lambda: self._out_of_fold("mmac")))

    def _maximum_margins(self) -> MaximumMargins:
        margin_test = self._make("detection", self.detection)
        network, half = own_copy(self.given[0]).to(self.device), HALF.get(str(self.trainer.precision))
        return margin_test(network, tuple(self.images.shape[1:]), self.num_classes, autocast=half)

    def _out_of_fold(self, name: str) -> Paired:
        """The model's correct decisions against those of repairs that never saw the image."""
        logits = cross_fitted_logits(
            lambda: self._make(name, self.repairs[name]), self.given[0], self.images, self.labels,
            folds=self.folds, seed=self.seed, make_trainer=self._nested_trainer,
        )  # fmt: skip
        labels = self.labels.cpu()
        return compare(self.decisions == labels, logits.argmax(1) == labels)

    def _repair(self) -> nn.Module:
        """The network to hand over, learned from the whole clean set."""
        assert self.decision is not None
        if self.decision.keep == "none":
            return self.given[0]
        self.kept = [self._make(self.decision.keep, self.repairs[self.decision.keep])]
        return fit_defense(self.kept[0], self.given[0], self.images, self.labels, make_trainer=self._nested_trainer)

    def _nested_trainer(self, epochs: int) -> L.Trainer:
        """A quiet Trainer on the same device and in the same precision as this defense's own."""
        devices = 1 if self.device.index is None else [self.device.index]
        return quiet_trainer(epochs, accelerator=self.device.type, devices=devices, precision=self.trainer.precision)

    def _make(self, name: str, factory: Callable[..., Made]) -> Made:
        """A new object that shares nothing with others from the same factory: a partial's arguments may hold state."""
        try:
            return copy.deepcopy(factory)(seed=self.seed)
        except UserError as error:
            raise UserError(f"defense.{name}: {error}") from error

    def _timed(self, part: str, work: Callable[[], Made]) -> Made:
        start = time.perf_counter()
        result = work()
        self.seconds[part] = time.perf_counter() - start
        return result


def mmom_repair(*, seed: int = 0) -> BoundLearning:
    """MMOM with the settings of ``conf/defense/mmom.yaml``."""
    return BoundLearning(
        objective=MMOMObjective(), sites="last", start=BoundStart(share=0.6, quantile=1.0), ascent=AscentPlan(refresh_every=10),
        penalty=LambdaController(initial=1e-5, min_agreement=0.0), steps=300, tolerance=1e-5, batch_size=5000, learning_rate=0.05,
        offset_rate=0.05, scale_rate=0.01, keep="last", seed=seed,
    )  # fmt: skip


def _accuracy(change: Paired) -> dict[str, float]:
    return {
        "gain": change.change, "better": change.more, "worse": change.fewer, "images": change.total,
        "p_gain": change.rise_p_value, "p_cost": change.fall_p_value,
    }  # fmt: skip
