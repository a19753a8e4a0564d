"""What every defense has in common: a model and clean samples in, a repaired network and what was found out."""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from marginclip.networks.logits import class_numbers
from marginclip.signals import TERMINATED
from marginclip.silence import endings_of_signals, silent_trainer, without_lightning_messages

TrainerFactory = Callable[[int], L.Trainer]
History = list[dict[str, float]]


@dataclass(frozen=True)
class Variant:
    """A further network to evaluate beside the repaired one, and the ``label`` that tables give it."""

    label: str
    network: nn.Module


@dataclass(frozen=True)
class RepairResult:
    """What a defense gives back.

    ``network`` maps images to logits; it shares nothing with the model that was given. ``history`` is the course of learning, an
    entry for each check or epoch. ``variants`` are further networks by the name of their row in the results. ``findings`` are plain
    values for the record, ``arrays`` tensors to keep with it, for figures.
    """

    network: nn.Module
    history: History = field(default_factory=list)
    variants: dict[str, Variant] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)


class Defense(ABC):
    """A post-training repair. A subclass writes :meth:`fit`.

    It sees the model and the clean set and nothing else: no trigger, no poisoned or test data. The model that it was given is never
    changed. One object can repair several models: each :meth:`fit` begins anew.

    ``label`` is what tables call it, ``clean_per_class`` how many clean images of a class the papers give it. ``oracles`` are the names
    of settings that take the word ``known``: whoever runs the defense tells it the value then (:meth:`tell`).
    ``bounds_activations`` says whether it gives a bounded network, which an artefact needs; None: only the result shows it.
    """

    label: str
    clean_per_class: int = 50
    oracles: tuple[str, ...] = ()
    bounds_activations: bool | None = None
    _asked: frozenset[str] = frozenset()  # the oracles that the settings ask for
    _told: dict[str, bool] | None = None

    def check_model(self, model: nn.Module, image: Tensor) -> None:  # noqa: B027 (most methods take every model)
        """Raise :class:`UserError`, before anything is trained, for a model, trained or not, that the method cannot work on.

        ``image`` (1, C, H, W) is of the size that the model takes.
        """

    @abstractmethod
    def fit(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        make_trainer: TrainerFactory = silent_trainer,
        resume: Path | None = None,
    ) -> RepairResult:
        """Repair ``model`` from clean images (N, C, H, W) in [0, 1] and labels (N,), whole numbers.

        ``make_trainer`` makes a Trainer from a number of epochs; ``resume`` is the checkpoint to go on from. A method that trains
        nothing needs neither. Raises :class:`UserError` for images, labels or models that do not fit.
        """

    def in_proportion(self, share: float, fewest: int | None = None) -> AbstractContextManager[None]:
        """Within it, a step takes ``share``, in (0, 1], of the images that it usually takes: for a repair from that share of a clean set.

        ``fewest`` is how many images the smallest class of the whole clean set has: what a method decides by that, it decides for the
        whole. Only methods whose steps take a fixed number of images do so; others learn as always.
        """
        return nullcontext()

    def tell(self, **known: Any) -> None:
        """Give the values of oracles by name; those that the settings do not ask for by ``known`` are not taken, None tells nothing."""
        self._asked |= {name for name in self.oracles if getattr(self, name) == "known"}
        asked = sorted(self._asked & known.keys())
        for name in asked:  # one object can repair several models: what was told of another is forgotten
            setattr(self, name, "known" if known[name] is None else known[name])
        if asked:
            self._told = {name: known[name] is not None for name in asked}

    @property
    def oracle_told(self) -> bool | None:
        """Whether the defense was told what only an oracle knows; None where it did not ask."""
        return None if self._told is None else all(self._told.values())


def with_gradients(fit: Callable[..., RepairResult]) -> Callable[..., RepairResult]:
    """Gradients are on inside a ``fit``, in inference mode too, and as they were afterwards; its labels are int64."""

    @functools.wraps(fit)
    def inside(self: Defense, model: nn.Module, images: Tensor, labels: Tensor, **settings: Any) -> RepairResult:
        with torch.inference_mode(False), torch.enable_grad():
            images, labels = (
                value.clone() if isinstance(value, Tensor) and value.is_inference() else value for value in (images, labels)
            )
            return fit(self, model, images, class_numbers(labels), **settings)

    return inside


class ComputedDefense(Defense):
    """A defense that computes its repair and trains nothing. A subclass writes :meth:`compute`."""

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
        """See :meth:`Defense.fit`; neither a Trainer nor a checkpoint is needed."""
        return self.compute(model, images, labels)

    @abstractmethod
    def compute(self, model: nn.Module, images: Tensor, labels: Tensor) -> RepairResult:
        """The repair of ``model`` from clean images (N, C, H, W) in [0, 1] and labels (N,)."""


class LearningDefense(L.LightningModule, Defense):
    """A defense that a Trainer fits: :meth:`prepare`, ``Trainer.fit`` on :meth:`batches`, :meth:`repaired`.

    A subclass writes these, ``num_epochs``, and ``training_step`` and ``configure_optimizers`` as in every LightningModule.
    """

    history: History

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
        """See :meth:`Defense.fit`. The repaired network is on the device of ``model``."""
        self.prepare(model, images, labels)
        with without_lightning_messages(), endings_of_signals():
            trainer = make_trainer(self.num_epochs)
            trainer.fit(self, self.batches(), ckpt_path=resume, weights_only=True if resume else None)
        if trainer.received_sigterm:  # in the last step, after which Lightning does not look
            sys.exit(TERMINATED)
        parameter = next(model.parameters(), None)
        self.to(images.device if parameter is None else parameter.device)  # Lightning leaves it on the CPU
        network = self.repaired()
        return RepairResult(network, self.history, self.variants(), self.findings(), self.arrays())

    @abstractmethod
    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Take the model and the clean set: images (N, C, H, W) in [0, 1], labels (N,). What an earlier repair left is forgotten."""

    @abstractmethod
    def batches(self) -> DataLoader[int]:
        """What the Trainer iterates over."""

    @property
    @abstractmethod
    def num_epochs(self) -> int:
        """How many rounds over :meth:`batches` the repair takes at most."""

    @property
    def usual_epochs(self) -> int:
        """How many of them it takes as a rule: what a display of its progress counts at first."""
        return self.num_epochs

    @abstractmethod
    def repaired(self) -> nn.Module:
        """The repaired network, a new module that maps images to logits."""

    def variants(self) -> dict[str, Variant]:
        """See :class:`RepairResult`; asked for after :meth:`repaired`, like the others."""
        return {}

    def findings(self) -> dict[str, Any]:
        """See :class:`RepairResult`."""
        return {}

    def arrays(self) -> dict[str, Tensor]:
        """See :class:`RepairResult`."""
        return {}
