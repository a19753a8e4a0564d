"""MMAC: bounds against backdoors (paper 1, Eq. 3 and Algorithm 1)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses.base import RepairResult, TrainerFactory
from marginclip.defenses.clipping.bound_learning import BoundLearning
from marginclip.errors import require
from marginclip.silence import nested_trainers, silent_trainer

log = logging.getLogger(__name__)
SEEDS_APART = 1000  # between two repeats, so that neighbouring seeds of an experiment share none


@dataclass(frozen=True)
class Repeat:
    """What one of several times found, and its bounds, on the CPU."""

    findings: dict[str, Any]
    bounds: dict[str, Tensor]


class MMAC(BoundLearning):
    """Maximum-margin activation clipping: :class:`BoundLearning` with its own defaults, which are the schedule ``fitted_start``.

    Bounds start as tight as the model bears: at the share of its clean maxima at which they keep 95 % of what it has right, or at 0.4 of
    the 0.9 quantile where clean images are few. From there a hinge lowers the margins of clean images that were moved towards other
    classes by a few small steps, while the cross entropy of the clean images buys accuracy back.

    A part of what bounds cut is chance: it follows from the order of the clean images and from which margin inputs were drawn. So
    bounds can be learned several times, each time from a seed of its own. Every activation then keeps the loosest of its bounds: only
    what all repeats cut is cut.

    Args:
        repeats: how often bounds are learned.
        seed: of the first time.
        **settings: those of :class:`BoundLearning`, with its defaults.

    Raises:
        UserError: as :class:`BoundLearning`.

    Examples:
        >>> MMAC(steps=120).steps
        120
        >>> MMAC(steps=0)
        Traceback (most recent call last):
        marginclip.errors.UserError: defense.steps must be at least 1, got 0
        >>> MMAC(repeats=0)
        Traceback (most recent call last):
        marginclip.errors.UserError: defense.repeats must be at least 1, got 0
    """

    label = "MMAC"

    def __init__(self, *, repeats: int = 1, seed: int = 0, **settings: Any) -> None:
        super().__init__(seed=seed, **settings)
        self.repeats, self.others = repeats, list[Repeat]()
        require(repeats >= 1, f"defense.repeats must be at least 1, got {repeats}")
        require(
            repeats == 1 or self.offset_rate is None,
            f"defense.repeats={repeats} needs defense.offset_rate=null: there is no loosest offset; got {self.offset_rate}",
        )

    def fit(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        make_trainer: TrainerFactory = silent_trainer,
        resume: Path | None = None,
    ) -> RepairResult:
        """See :meth:`Defense.fit`. The first repeat comes last, and its checkpoints have the bounds of the others."""
        self.others = []  # a repeat is a repair of its own, which has no others
        saved = _others_in(resume, make_trainer(1)) if resume is not None and self.repeats > 1 else None
        self.others = saved or [self._repeat(repeat, model, images, labels, make_trainer) for repeat in range(1, self.repeats)]
        return super().fit(model, images, labels, make_trainer=make_trainer, resume=resume)

    def _repeat(self, repeat: int, model: nn.Module, images: Tensor, labels: Tensor, make_trainer: TrainerFactory) -> Repeat:
        """What is learned from the seed of a further repeat."""
        if self.part == 1:
            log.info("MMAC learns its bounds %d times: time %d, without a progress display", self.repeats, repeat)
        own, self.seed = self.seed, self.seed + SEEDS_APART * repeat
        try:
            result = super().fit(model, images, labels, make_trainer=nested_trainers(make_trainer(1)))
        finally:
            self.seed = own
        assert isinstance(result.network, BoundedNetwork)
        return Repeat(result.findings, _on_cpu(result.network.bounds_state()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["other_repeats"] = [(other.findings, other.bounds) for other in self.others]

    def repaired(self) -> BoundedNetwork:
        """The bounded network with the loosest bounds of all repeats. Relaxed ones count only where all had to be relaxed."""
        network = super().repaired()
        if self.others:
            repeats = [Repeat({"relaxed": self.relaxed}, _on_cpu(network.bounds_state())), *self.others]
            kept = [each for each in repeats if not each.findings["relaxed"]] or repeats
            network.load_bounds(loosest([each.bounds for each in kept]))
        return network

    def findings(self) -> dict[str, Any]:
        """Those of :class:`BoundLearning`, of the first repeat; below ``other_repeats`` those of the others, where there are such."""
        others = [other.findings for other in self.others]
        return super().findings() | ({"other_repeats": others} if others else {})


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in state.items()}


def _others_in(checkpoint: Path, trainer: L.Trainer) -> list[Repeat]:
    """What the other repeats found, from a checkpoint of the first; nothing where an earlier version wrote it."""
    saved = trainer.strategy.checkpoint_io.load_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    return [Repeat(findings, bounds) for findings, bounds in saved.get("other_repeats", [])]


def loosest(bounds: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of several states of the same bounds the largest upper and the smallest lower ones.

    Examples:
        >>> loosest([{"act.upper": torch.tensor([1.0, 3.0])}, {"act.upper": torch.tensor([2.0, 1.0])}])
        {'act.upper': tensor([2., 3.])}
    """
    return {
        name: torch.stack([state[name] for state in bounds]).amax(0)
        if name.endswith("upper")
        else torch.stack([state[name] for state in bounds]).amin(0)
        for name in bounds[0]
    }
