"""The settings of bound learning that belong together: where bounds start, and how margins are ascended."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from marginclip.clipping import BoundedNetwork
from marginclip.defenses.clipping.feasibility import fit_share
from marginclip.errors import require
from marginclip.maxmargin.margin import ASCENT_RULES, random_starts
from marginclip.networks.logits import smallest_class

log = logging.getLogger(__name__)
KEPT = 0.95  # pi of the papers
FEW = 20  # clean images of the smallest class: with five, on GTSRB, the fitted start leaves much of a faint trigger
SHARE_OF_FEW, QUANTILE_OF_FEW = 0.4, 0.9  # the start of the schedule tight_start
REPLACED = (
    "the smallest class has %d clean images, fewer than %d: bounds start at %g of the %g quantile of the clean maxima, and are not fitted "
    "to the model (defense.start.kept=0.95 fits them all the same)"
)


@dataclass(frozen=True)
class BoundStart:
    """Where bounds start: one constant, or a share of what each map reaches on clean images. The share is given, or fitted to the model.

    Args:
        constant: one start for every bound. None: ``share`` and ``quantile`` say it.
        share: of each map's clean maximum. None: the smallest share, the same for all maps, at which bounds keep ``kept``.
        quantile: over the clean images, of the maps' per-image maxima; 1 is the maximum.
        kept: what bounds keep of the clean images that the model classifies correctly, in (0, 1]. None: 0.95, pi of the papers; and where
            a class has fewer than 20 images nothing is fitted to them: bounds start at 0.4 of the 0.9 quantile. Without effect where a
            share or a constant is given, and where ``quantile`` is below 1, which means 0.95. There even share 1 may keep less; then it
            is share 1.

    Raises:
        UserError: for a setting outside its range.
    """

    constant: float | None = None
    share: float | None = None
    quantile: float = 1.0
    kept: float | None = None

    def __post_init__(self) -> None:
        require(self.constant is None or self.constant > 0, f"defense.start.constant must be positive, got {self.constant}")
        require(self.share is None or self.share > 0, f"defense.start.share must be positive or null, got {self.share}")
        require(0 < self.quantile <= 1, f"defense.start.quantile must be in (0, 1], got {self.quantile:g}")
        require(self.kept is None or 0 < self.kept <= 1, f"defense.start.kept must be in (0, 1] or null, got {self.kept}")

    @property
    def fitted(self) -> bool:
        """Whether the share is fitted to the model."""
        return self.constant is None and self.share is None

    def decided(self, fewest: int) -> BoundStart:
        """The start for a clean set whose smallest class has ``fewest`` images: what is not given is filled in.

        A decided start stays as it is, so a fold of the clean set can be handed the decision for the whole.
        """
        if not self.fitted or self.kept is not None:
            return self
        if fewest < FEW and self.quantile == 1:
            return BoundStart(share=SHARE_OF_FEW, quantile=QUANTILE_OF_FEW)
        return replace(self, kept=KEPT)

    def apply(self, bounded: BoundedNetwork, images: Tensor, labels: Tensor) -> BoundStart:
        """Set the bounds of ``bounded`` from clean ``images`` (N, C, H, W) and their ``labels`` (N,), which only a fitted share needs.

        Returns the start that was taken, with the share that was found.
        """
        if self.constant is not None:
            bounded.set_constant(self.constant)
            return self
        fewest = smallest_class(bounded, images, labels)
        start = self.decided(fewest)
        if start.quantile != self.quantile:
            log.info(REPLACED, fewest, FEW, SHARE_OF_FEW, QUANTILE_OF_FEW)
        bounded.set_from_images(images, share=1.0 if start.share is None else start.share, quantile=start.quantile)
        if not start.fitted:
            return start
        assert start.kept is not None  # it is decided
        return replace(start, share=fit_share(bounded, images, labels, start.kept))


STARTS = ("noise", "clean")


@dataclass(frozen=True)
class AscentPlan:
    """How margin inputs are made, and when.

    Starts are ``noise``, uniform in [0, 1] as in the papers, or ``clean``: randomly chosen clean images of *other* classes. A few
    small steps from there look for what a trigger does, a small change that flips any image to the class.

    Args:
        network: whose margins are ascended: ``bounded`` (Algorithm 1) or ``original`` (published script).
        start_from: ``clean`` or ``noise``.
        starts_per_class: margin inputs of a class.
        first_steps: steps of ascent at the first refresh.
        steps: steps of ascent at a later refresh.
        refresh_every: bound steps between two refreshes.
        warm_start: whether margin inputs go on from where they are, or from new starts.
        rule: how the gradient becomes a direction: ``raw``, ``sign`` or ``unit_rms``.
        step_size: length of a step.
        momentum: of the ascent.
        tolerance: an ascent ends where the margins grow by less. 0: never.
        batch_size: margin inputs that count in a bound step (published script: as many as clean images). None: all.
        max_inputs: limit of the margin inputs of a refresh, so that their cost does not grow with the number of classes. A class gets fewer
            starts where there are many. Where there are more classes than inputs, each refresh takes other ones, all in turn. None:
            no limit.
    """

    network: str = "bounded"
    start_from: str = "clean"
    starts_per_class: int = 5
    first_steps: int = 4
    steps: int = 4
    refresh_every: int = 2
    warm_start: bool = False
    rule: str = "unit_rms"
    step_size: float = 0.005
    momentum: float = 0.0
    tolerance: float = 0.0
    batch_size: int | None = None
    max_inputs: int | None = 100

    def __post_init__(self) -> None:
        require(
            self.network in ("bounded", "original"),
            f"defense.ascent.network must be 'bounded' or 'original', got '{self.network}'",
        )
        require(
            self.start_from in STARTS,
            f"defense.ascent.start_from must be one of {', '.join(STARTS)}, got '{self.start_from}'",
        )
        require(self.rule in ASCENT_RULES, f"defense.ascent.rule must be one of {', '.join(ASCENT_RULES)}, got '{self.rule}'")
        for key in ("starts_per_class", "refresh_every"):
            require(getattr(self, key) >= 1, f"defense.ascent.{key} must be at least 1, got {getattr(self, key)}")
        require(
            self.batch_size is None or self.batch_size >= 1,
            f"defense.ascent.batch_size must be at least 1 or null, got {self.batch_size}",
        )
        require(
            self.max_inputs is None or self.max_inputs >= 1,
            f"defense.ascent.max_inputs must be at least 1 or null, got {self.max_inputs}",
        )
        for key in ("first_steps", "steps"):
            require(getattr(self, key) >= 0, f"defense.ascent.{key} must not be negative, got {getattr(self, key)}")
        require(self.step_size > 0, f"defense.ascent.step_size must be positive, got {self.step_size:g}")
        require(0 <= self.momentum < 1, f"defense.ascent.momentum must be in [0, 1), got {self.momentum:g}")
        require(self.tolerance >= 0, f"defense.ascent.tolerance must not be negative, got {self.tolerance:g}")

    def classes(self, num_classes: int, *, refresh: int = 0, seed: int = 0) -> Tensor:
        """The class that each margin input climbs for at the refresh of this number, (N,) int64: all classes, or a part of them in turn.

        Raises :class:`UserError` where a part would have to be taken but inputs are to be kept (``warm_start``).
        """
        most = self.max_inputs or num_classes * self.starts_per_class
        if num_classes <= most:
            return torch.arange(num_classes).repeat_interleave(min(self.starts_per_class, most // num_classes))
        require(
            not self.warm_start,
            f"defense.ascent.warm_start keeps the margin inputs of all {num_classes} classes: set defense.ascent.max_inputs=null, "
            f"got {self.max_inputs}",
        )
        places = torch.arange(refresh * most, (refresh + 1) * most)
        turns = {int(turn): _order(num_classes, seed, int(turn)) for turn in (places // num_classes).unique()}
        return torch.stack([turns[int(place // num_classes)][place % num_classes] for place in places])

    def in_proportion(self, share: float) -> AscentPlan:
        """The same with ``share``, in (0, 1], of the margin inputs, rounded up; the limit stays where all classes must fit below it."""
        limits = ("starts_per_class", "batch_size") if self.warm_start else ("starts_per_class", "batch_size", "max_inputs")
        fewer = {key: math.ceil(count * share) for key in limits if (count := getattr(self, key)) is not None}
        return replace(self, **fewer)

    def search(self, *, first: bool) -> dict[str, Any]:
        """The settings of :func:`~marginclip.maxmargin.margin.ascend_margins` at the first refresh, or at a later one."""
        steps = self.first_steps if first else self.steps
        shared = {key: getattr(self, key) for key in ("step_size", "rule", "momentum", "tolerance")}
        return {"steps": steps, **shared}

    def starts(self, images: Tensor, labels: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        """New margin inputs (N, C, H, W), one for each class of ``wanted`` (N,), given the clean set (M, C, H, W) and its labels (M,)."""
        if self.start_from == "noise":
            return random_starts(len(wanted), images.shape[1:], generator=generator, device=images.device).to(images.dtype)
        return images[self.start_rows(labels, wanted, generator)].clone()

    def start_rows(self, labels: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        """Rows (N,) of randomly chosen clean images, by their ``labels`` (M,), of another class than each of ``wanted`` (N,)."""
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        shuffled = labels[order]
        rows = []
        for number, label in enumerate(wanted):
            others = (shuffled != label).nonzero().flatten()
            rows.append(order[others[number % len(others)]] if len(others) else order[0])
        return torch.stack(rows)


def _order(count: int, seed: int, turn: int) -> Tensor:
    """All of ``count`` classes in a random order of this turn's own."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn + 49979687))


def minibatch(count: int, size: int, step: int, seed: int) -> Tensor:
    """``size`` of ``count`` rows for one step, (size,) int64: whole passes in a seeded order that depends on the step alone."""
    if size >= count:
        return torch.arange(count)
    per_pass = -(-count // size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_pass)
    rows: Tensor = torch.randperm(count, generator=generator).split(size)[step % per_pass]
    return rows
