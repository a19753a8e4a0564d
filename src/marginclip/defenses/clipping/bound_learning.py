"""Bound learning: the training step alternates margin ascent, where the objective needs it, and bound descent."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from marginclip.clipping import BoundedNetwork, activation_extremes
from marginclip.clipping.fixed_part import FixedPartCache, caching_pays
from marginclip.defenses.base import History, LearningDefense
from marginclip.defenses.clipping.feasibility import (
    ACCEPTED,
    LESS_ACCURATE,
    RELAXED,
    CheckedBounds,
    relax_until_accurate,
    start_offsets,
)
from marginclip.defenses.clipping.settings import AscentPlan, BoundStart, minibatch
from marginclip.errors import require
from marginclip.maxmargin.lambda_control import LambdaController
from marginclip.maxmargin.margin import ascend_margins, margin
from marginclip.maxmargin.objectives import BoundObjective, Measured, MMACObjective, Objective
from marginclip.networks.layout import channels_last
from marginclip.networks.logits import check_clean_set, clean_logits
from marginclip.networks.memory import images_at_once, images_that_fit, memory_budget

log = logging.getLogger(__name__)
KEEP = ("feasible", "best", "last")


class BoundLearning(LearningDefense):
    """What MMAC, MMOM and MMBM have in common: learns an upper (and, where needed, lower) bound for activations from clean images.

    Each step refreshes the margin inputs when they are due, then takes one Adam step on the bounds towards a lower objective (paper 1,
    Algorithm 1). Every ``check_every`` steps the accuracy on the clean images that the model classifies correctly is measured. It moves
    lambda, and says which bounds are returned.

    Args:
        objective: what is minimised; it tells the methods apart (:func:`~marginclip.maxmargin.objectives.mmac`). None: MMAC's.
        sites: which activations are bounded: ``all``, ``last``, ``first_half`` or a list of names
            (:func:`~marginclip.clipping.activations.choose_sites`).
        start: where the bounds start. None: at a share of the clean maxima that is fitted to the model (:class:`BoundStart`).
        ascent: how margin inputs are made and when. None: its defaults; an objective without margins takes None only.
        lambda_: the weight of the margin term, and how it moves. None: its defaults.
        steps: bound steps to take.
        extra_steps: further steps, taken with ``keep="feasible"`` until bounds that were learned for ``steps`` keep the accuracy.
        tolerance: end before ``steps`` when two losses in a row differ by less; only where every step takes the whole clean set.
            None: never.
        batch_size: clean images in a step; for MMAC and MMBM, of those that the model classifies correctly.
        learning_rate: of Adam, for the bounds.
        lr_scale: ``relative`` multiplies the learning rate at each activation by the mean of its initial bounds, so that it means the
            same for models of any scale; ``absolute`` does not.
        offset_rate: learning rate, in logits, of one offset a class that is learned with the bounds. None: no offsets.
        scale_rate: learning rate of one factor of all logits, the inverse of a temperature; needs ``offset_rate``. None: no factor.
            Offsets and factor start where they fit the clean set best under the starting bounds.
        keep: the bounds to return. ``feasible``: the last that kept the accuracy at ``lambda_.min_agreement``; ``best``: those among
            them of the lowest objective at the initial lambda; ``last``: the last, as the published scripts. Where none kept it,
            ``feasible`` returns the most accurate ones if they kept 0.95, the papers' constraint. Else these, or the last ones with
            ``best``, are relaxed towards the clean maxima until they keep that, or ``lambda_.min_agreement`` with ``best``.
        project: project the bounds to feasible values after every step.
        check_every: steps between two checks of the accuracy.
        channel_axis: where the channels of activations with more than two axes are. None: found by the model's layers.
        seed: of the margin inputs and of the order of the clean images.

    Raises:
        UserError: for a setting outside its range, and for one that has no effect beside the others.
    """

    label = "learned bounds"
    bounds_activations = True
    images: Tensor
    labels: Tensor
    targets: Tensor
    wanted: Tensor
    margin_inputs: Tensor
    last_loss: float
    checked_at: int
    prefix: FixedPartCache | None
    started: BoundStart
    at_once: int

    def __init__(
        self,
        *,
        objective: BoundObjective | None = None,
        sites: str | Sequence[str] = "all",
        start: BoundStart | None = None,
        ascent: AscentPlan | None = None,
        lambda_: LambdaController | None = None,
        steps: int = 60,
        extra_steps: int = 180,
        tolerance: float | None = None,
        batch_size: int = 100,
        learning_rate: float = 0.05,
        lr_scale: str = "relative",
        offset_rate: float | None = None,
        scale_rate: float | None = None,
        keep: str = "feasible",
        project: bool = True,
        check_every: int = 5,
        channel_axis: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(steps >= 1, f"defense.steps must be at least 1, got {steps}")
        require(extra_steps >= 0, f"defense.extra_steps must not be negative, got {extra_steps}")
        require(tolerance is None or tolerance > 0, f"defense.tolerance must be positive or null, got {tolerance}")
        require(batch_size >= 1, f"defense.batch_size must be at least 1, got {batch_size}")
        require(0 < learning_rate <= 1e30, f"defense.learning_rate must be in (0, 1e30], got {learning_rate:g}")
        require(offset_rate is None or offset_rate > 0, f"defense.offset_rate must be positive or null, got {offset_rate}")
        require(scale_rate is None or scale_rate > 0, f"defense.scale_rate must be positive or null, got {scale_rate}")
        require(
            scale_rate is None or offset_rate is not None,
            f"defense.scale_rate={scale_rate} needs defense.offset_rate, which is null; set defense.scale_rate=null too",
        )
        require(lr_scale in ("absolute", "relative"), f"defense.lr_scale must be 'absolute' or 'relative', got '{lr_scale}'")
        require(keep in KEEP, f"defense.keep must be one of {', '.join(KEEP)}, got '{keep}'")
        require(check_every >= 1, f"defense.check_every must be at least 1, got {check_every}")
        named = sites if isinstance(sites, str) else list(sites) if isinstance(sites, Sequence) else None
        require(
            named is not None and all(isinstance(name, str) for name in named),
            f"defense.sites must be all, last, first_half or a list of names of activations, got '{sites}'",
        )
        self.objective: BoundObjective = objective or MMACObjective()
        require(
            self.objective.ascends or ascent is None,
            f"defense.ascent has no effect: {type(self.objective).__name__} needs no margins; set it to null",
        )
        self.sites = sites
        self.start, self.ascent = start or BoundStart(), ascent or AscentPlan()
        self.lambda_ = lambda_ or LambdaController()
        self.steps, self.extra_steps = steps, extra_steps if keep == "feasible" else 0
        self.batch_size, self.learning_rate, self.lr_scale = batch_size, learning_rate, lr_scale
        self.offset_rate, self.scale_rate, self.tolerance = offset_rate, scale_rate, tolerance
        self.keep, self.project, self.check_every = keep, project, check_every
        self.channel_axis, self.seed = channel_axis, seed
        self.part = 1.0  # of the clean set that it learns from
        self._forget()

    # -- the defense contract -------------------------------------------------------------------------------------------------

    def check_model(self, model: nn.Module, image: Tensor) -> None:
        """Whether its activations can be bounded, at these ``sites`` and this ``channel_axis``."""
        BoundedNetwork(model, image, channel_axis=self.channel_axis, sites=self.sites)

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Bound a copy of the model and set the bounds' start from the clean set."""
        self._forget()
        logits = clean_logits(model, images)
        check_clean_set(images, labels, logits.shape[1])
        correct = logits.argmax(1).cpu() == labels.cpu()
        require(
            bool(correct.any()) or not self.objective.correct_only,
            f"the model classifies none of the {len(images)} clean images correctly; are the labels right?",
        )
        self.bounded = BoundedNetwork(
            model, images[:1], channel_axis=self.channel_axis, sites=self.sites,
            offsets=self.offset_rate is not None, scaled=self.scale_rate is not None,
        )  # fmt: skip
        channels_last(self.bounded)
        self.started = self.start.apply(self.bounded, images, labels)
        self.working = [self.bounded.fused()]  # in a list: its parameters are the bounded network's own
        kept = (correct if self.objective.correct_only else torch.ones_like(correct)).nonzero().flatten().to(images.device)
        self.register_buffer("images", images[kept].contiguous(memory_format=torch.channels_last), persistent=False)
        self.register_buffer("labels", labels[kept.to(labels.device)].to(images.device), persistent=False)
        if self.bounded.offsets is not None:
            start_offsets(self.bounded.offsets, clean_logits(self.bounded, images[kept]), labels[kept.to(labels.device)])
        self.register_buffer("targets", logits[kept.to(logits.device)].to(images.device), persistent=False)
        self.num_classes = logits.shape[1]
        wanted = self._classes(0) if self.objective.ascends else torch.zeros(0, dtype=torch.long)
        self.register_buffer("wanted", wanted, persistent=False)
        self.register_buffer(
            "margin_inputs", torch.zeros(len(self.wanted), *images.shape[1:], dtype=images.dtype), persistent=True
        )
        self.extremes = activation_extremes(self.bounded, self.images)

    def batches(self) -> DataLoader[int]:
        """One round is the steps up to the next check; which images a step takes follows from its number."""
        return DataLoader(range(self.check_every), batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]

    @property
    def num_epochs(self) -> int:
        return self.usual_epochs + -(-self.extra_steps // self.check_every)

    @property
    def usual_epochs(self) -> int:
        return -(-self.steps // self.check_every)

    def repaired(self) -> BoundedNetwork:
        """The bounded network with the bounds to keep."""
        if self.keep == "last":
            return self.bounded
        checked = self.checked
        if checked.best:
            # Not measured again: another precision would count an image or two otherwise, and relax all for it.
            self.bounded.load_bounds(checked.best)
            return self.bounded
        asked, taken = self.lambda_.min_agreement, self.stopped_at or self.checked_at
        least = min(ACCEPTED, asked) if checked.most_accurate else asked
        if checked.most_accurate:
            self.bounded.load_bounds(checked.most_accurate)
        if checked.most_accurate and checked.agreement >= least:
            self._warn(LESS_ACCURATE, 100 * asked, taken, 100 * checked.agreement)
            return self.bounded
        self.relaxed = relax_until_accurate(self.bounded, self.images, self.labels, least)
        if self.relaxed:
            self._warn(RELAXED, 100 * least, taken, 100 * self.relaxed)
        return self.bounded

    def _warn(self, message: str, *values: float) -> None:
        """Tell the user, unless these are the bounds of a fold."""
        if self.part == 1:
            log.warning(message, *values)

    @contextmanager
    def in_proportion(self, share: float, fewest: int | None = None) -> Iterator[None]:
        """See :meth:`Defense.in_proportion`: as many steps as always, of fewer clean images and margin inputs."""
        whole = self.batch_size, self.ascent, self.start, self.part
        self.batch_size, self.ascent = math.ceil(share * self.batch_size), self.ascent.in_proportion(share)
        self.start = self.start if fewest is None else self.start.decided(fewest)
        self.part *= share  # its bounds are not the user's: nothing is said of them
        try:
            yield
        finally:
            self.batch_size, self.ascent, self.start, self.part = whole

    # -- learning -------------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = []
        for _, bound in self.bounded.each():
            values = list(bound.values())
            scale = float(torch.cat([value.detach().abs() for value in values]).mean()) if self.lr_scale == "relative" else 1.0
            groups.append({"params": values, "lr": self.learning_rate * max(scale, 1e-6)})
        if self.bounded.offsets is not None:
            groups.append({"params": [self.bounded.offsets.value], "lr": self.offset_rate})
            if self.bounded.offsets.scale is not None:
                groups.append({"params": [self.bounded.offsets.scale], "lr": self.scale_rate})
        return torch.optim.Adam(groups)

    def on_fit_start(self) -> None:
        if self.working[0] is not self.bounded:
            self.working[0].network.to(self.device)
        with self.trainer.precision_plugin.forward_context():
            budget = memory_budget(self.device)
            self.at_once = images_that_fit(self.working[0], self.images[:1], self.working[0], budget)
            pays = caching_pays(self.working[0], self.images[:1], len(self.images))
            self.prefix = FixedPartCache(self.working[0], self.images) if pays else None
        if not self.history:
            self._check()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """End where the steps are taken, which may be within a round, or when the loss has come to rest."""
        unchecked = self.global_step == self.steps and self.checked_at < self.steps
        return -1 if self._steps_taken() or unchecked or self.stopped_at else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self.global_step
        if self.objective.ascends:
            self.wanted = self._classes(step)
        if self.objective.ascends and step % self.ascent.refresh_every == 0:
            self._ascend(step)
        rows = self._minibatch(len(self.images), self.batch_size, step)
        size = self.ascent.batch_size
        margins = self._margins(slice(None) if size is None else self._minibatch(len(self.wanted), size, step))
        terms = self._terms(self._bounded_logits(rows), rows, margins, self.lambda_.value)
        self._log_step(terms, margins)
        return terms.loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.project:
            self.bounded.project_()
        if self.tolerance is not None and self.batch_size >= len(self.images):  # losses of other images do not compare
            loss = float(outputs["loss"])
            if self.trainer.strategy.reduce_boolean_decision(abs(loss - self.last_loss) < self.tolerance):
                self.stopped_at, self.trainer.should_stop = self.global_step, True
            self.last_loss = loss

    def on_train_epoch_end(self) -> None:
        if self.checked_at != self.global_step:  # else nothing was learned: a run that had ended was resumed
            self._check()
        if self._steps_taken():
            self.trainer.should_stop = True

    def findings(self) -> dict[str, Any]:
        """How long bounds were learned, what ended it, ``tolerance`` or ``steps``, how far they had to be relaxed, and a fitted start."""
        found: dict[str, Any] = {"bound_steps": self.stopped_at or self.checked_at, "relaxed": self.relaxed}
        found["stopped_by"] = "tolerance" if self.stopped_at else "steps"
        start = {"start_share": self.started.share, "start_quantile": self.started.quantile} if self.start.fitted else {}
        return found | start

    def _steps_taken(self) -> bool:
        """Whether ``steps`` are taken and bounds found that keep the accuracy after them, or ``extra_steps`` are taken, too.

        Bounds that kept it before do not count: the margin term has only begun on them, and what they leave of a trigger can be much.
        """
        return self.global_step >= self.steps + self.extra_steps or self.checked.step >= self.steps

    def _forget(self) -> None:
        """Be as new, before or after learning."""
        self.checked, self.history = CheckedBounds(), History()
        self.last_loss, self.relaxed = float("nan"), 0.0
        self.stopped_at, self.checked_at = 0, -1
        self.prefix, self.at_once = None, sys.maxsize
        self.lambda_.reset()

    def _margins(self, rows: Tensor | slice) -> Tensor:
        """The margins of these margin inputs under the present bounds, (N,); none for an objective that needs none."""
        if not self.objective.ascends:
            return torch.zeros(0, device=self.device)
        return margin(self._through(self.margin_inputs[rows]).float(), self.wanted[rows])

    def _bounded_logits(self, rows: Tensor) -> Tensor:
        """The logits (B, K) of the clean images of these rows under the present bounds."""
        return self.prefix(rows) if self.prefix is not None else self._through(self.images[rows])

    def _through(self, images: Tensor) -> Tensor:
        """The logits (B, K) of images (B, C, H, W). Beyond the memory budget, parts are computed again in the backward pass."""
        network, most = self.working[0], max(1, self.at_once // 2)  # clean images and margin inputs share the budget
        if len(images) <= most:
            logits: Tensor = network(images)
            return logits
        return torch.cat([checkpoint(network, part, use_reentrant=False) for part in images.split(most)])

    def _terms(self, bounded_logits: Tensor, rows: Tensor | slice, margins: Tensor, lambda_: float) -> Objective:
        bounds = self.bounded.bound_parameters()
        return self.objective(Measured(bounded_logits, self.targets[rows], self.labels[rows], margins, bounds), lambda_)

    def _classes(self, step: int) -> Tensor:
        """The classes of the margin inputs at a step, which are those of its last refresh."""
        refresh = step // self.ascent.refresh_every
        return self.ascent.classes(self.num_classes, refresh=refresh, seed=self.seed).to(self.device)

    def _ascend(self, step: int) -> None:
        first, plan = step == 0, self.ascent
        if first or not plan.warm_start:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            self.margin_inputs = plan.starts(self.images, self.labels, self.wanted, generator)
        with self.bounded.unbounded() if plan.network == "original" else nullcontext():
            found = ascend_margins(self.working[0], self.wanted, self.margin_inputs, **plan.search(first=first))
        self.margin_inputs = found.images

    def _minibatch(self, count: int, size: int, step: int) -> Tensor:
        return minibatch(count, size, step, self.seed).to(self.device)

    @torch.no_grad()
    def _check(self) -> None:
        """Measure accuracy and objective on the whole clean set, move lambda, and keep the best bounds so far."""
        self.checked_at = self.global_step
        with self.trainer.precision_plugin.forward_context():
            everything = torch.arange(len(self.images), device=self.device)
            logits = torch.cat([self._bounded_logits(rows).float() for rows in everything.split(images_at_once(self.images))])
            margins = self._margins(slice(None))
        agreement = float((logits.argmax(1) == self.labels).double().mean())
        terms = self._terms(logits, slice(None), margins, self.lambda_.initial)
        score = float(terms.loss)
        require(math.isfinite(score), f"bound learning diverged: the objective is {score}; try a lower defense.learning_rate")
        # The start is checked before there are margin inputs: it is the fallback, to be beaten by any later state.
        checked = self.checked
        better = score < checked.score or len(self.history) == 1 or self.keep == "feasible"
        if agreement >= self.lambda_.min_agreement and better:
            checked.score = score if self.history else float("inf")
            checked.best, checked.step = self.bounded.bounds_state(), self.global_step
        if self.history:
            if self.keep == "feasible" and agreement >= checked.agreement:
                checked.agreement, checked.most_accurate = agreement, self.bounded.bounds_state()
            self.lambda_.update(agreement)
        active = self.bounded.active_share(self.extremes)
        largest = {"mean_margin": float(margins.mean()), "max_margin": float(margins.max())} if len(margins) else {}
        entry = {"agreement": agreement, "data": float(terms.data), **largest, "lambda": self.lambda_.value}
        self.history.append(entry | {"active_bounds": active})
        if len(self.history) > 1:
            self.log_dict({"defense/agreement": agreement, "defense/active_bounds": active}, prog_bar=True, batch_size=1)

    def _log_step(self, terms: Objective, margins: Tensor) -> None:
        self.log_dict({"defense/loss": terms.loss, "defense/data_term": terms.data, "defense/lambda": self.lambda_.value})
        if len(margins):
            self.log_dict({"defense/mean_margin": margins.mean(), "defense/max_margin": margins.max()}, prog_bar=True)

    # -- resuming -------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["bound_learning"] = {
            "lambda": self.lambda_.state_dict(), "history": self.history, "checked": dict(vars(self.checked)),
            "last_loss": self.last_loss, "stopped_at": self.stopped_at, "checked_at": self.checked_at,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["bound_learning"]
        self.lambda_.load_state_dict(state["lambda"])
        self.history, self.checked = state["history"], CheckedBounds(**state["checked"])
        self.last_loss, self.stopped_at, self.checked_at = state["last_loss"], state["stopped_at"], state["checked_at"]
