"""MM-BD: whether a model has a backdoor, and which class it leads to, from its maximum margins alone: no image is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from marginclip.errors import require
from marginclip.maxmargin.margin import ASCENT_RULES, ascend_margins, margin, random_starts
from marginclip.networks.copies import frozen_copy
from marginclip.networks.layout import channels_last
from marginclip.networks.logits import batched_logits, check_full_precision
from marginclip.networks.memory import images_at_once, memory_budget

CALIBRATIONS = ("bootstrap", "none")
SMALLEST_SHARE = 0.01
COPIES = 6  # of the random images, at the peak of a search


@dataclass(frozen=True)
class MaximumMargins:
    """What MM-BD says of a model of K classes.

    Args:
        statistics: the maximum margin of every class, (K,) in logits.
        p_value: of the largest of them, calibrated.
        suspect: its class.
        detected: whether there is a backdoor by this test.
        uncalibrated_p_value: the p-value as published.
        shape: of the gamma null.
        scale: of the gamma null, in logits.
        images: the input of largest margin of every class, (K, C, H, W) in [0, 1]. None where they were not searched for.
    """

    statistics: Tensor
    p_value: float
    suspect: int
    detected: bool
    uncalibrated_p_value: float
    shape: float
    scale: float
    images: Tensor | None = None


@dataclass(frozen=True)
class MaximumMarginTest:
    """The settings of MM-BD; called with a model, the shape of its images (C, H, W) and its number of classes K.

    r_t, the statistic of class t, is the largest margin that gradient ascent finds from random images
    (:func:`~marginclip.maxmargin.margin.ascend_margins`). A gamma distribution G is fitted to all but the largest;
    p = 1 - G(r_max)^e is the chance that the largest of e draws is as large. This p is far too small as the null was fitted
    without the largest value: at K = 10 and a nominal 5 % it accuses about a quarter of clean models. So it is calibrated.

    Args:
        starts: random images that each class starts from, the same for all classes.
        steps: most steps of an ascent, from 0 up.
        step_size: of the ascent, positive.
        rule: how the gradient becomes a direction: ``raw``, ``unit_norm``, ``unit_rms`` or ``sign``.
        tolerance: an ascent ends where the mean best margin grows by less, relative to itself, over 10 steps. 0: never.
        calibration: ``bootstrap`` replaces p by the share of simulated sets of K draws from the fitted null that, treated alike
            (maximum left out, null refitted), give a p as small. ``none`` is the published p-value, but for the location of the
            null, which is 0 here.
        simulations: how many sets ``bootstrap`` draws, at least 100.
        exponent: what e is: ``classes`` (K, the published script) or ``others`` (K - 1).
        alpha: a backdoor is detected where p is not above this, in (0, 1).
        seed: of the random images and of the simulated sets.

    Raises:
        UserError: for a setting outside its range.
    """

    starts: int = 30
    steps: int = 300
    step_size: float = 0.01
    rule: str = "raw"
    tolerance: float = 1e-5
    calibration: str = "bootstrap"
    simulations: int = 10_000
    exponent: str = "classes"
    alpha: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.starts >= 1, f"detect.starts must be at least 1, got {self.starts}")
        require(self.steps >= 0, f"detect.steps must not be negative, got {self.steps}")
        require(self.step_size > 0, f"detect.step_size must be positive, got {self.step_size:g}")
        require(self.rule in ASCENT_RULES, f"detect.rule must be one of {', '.join(ASCENT_RULES)}, got '{self.rule}'")
        require(self.tolerance >= 0, f"detect.tolerance must not be negative, got {self.tolerance:g}")
        require(
            self.calibration in CALIBRATIONS,
            f"detect.calibration must be one of {', '.join(CALIBRATIONS)}, got '{self.calibration}'",
        )
        require(self.simulations >= 100, f"detect.simulations must be at least 100, got {self.simulations}")
        require(self.exponent in ("classes", "others"), f"detect.exponent must be 'classes' or 'others', got '{self.exponent}'")
        require(0 < self.alpha < 1, f"detect.alpha must be in (0, 1), got {self.alpha:g}")

    def __call__(
        self,
        model: nn.Module,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        autocast: torch.dtype | None = None,
        track: Callable[[range], Iterable[int]] = iter,
    ) -> MaximumMargins:
        """Test ``model``, which is not changed; ``autocast`` is the precision of the ascent, the margins themselves are fp32.

        ``track`` goes through the steps of the ascent, and can show how far it is.
        """
        statistics, images = self.search(model, image_shape, num_classes, autocast=autocast, track=track)
        return replace(self.judge(statistics), images=images)

    def statistics(
        self, model: nn.Module, image_shape: Sequence[int], num_classes: int, *, autocast: torch.dtype | None = None
    ) -> Tensor:
        """r_t of every class (K,), on the CPU."""
        return self.search(model, image_shape, num_classes, autocast=autocast)[0]

    def search(
        self,
        model: nn.Module,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        autocast: torch.dtype | None = None,
        track: Callable[[range], Iterable[int]] = iter,
    ) -> tuple[Tensor, Tensor]:
        """r_t of every class (K,) and the images that reach them (K, C, H, W), on the CPU."""
        require(num_classes >= 3, f"MM-BD compares each class with the others and needs at least 3 classes, got {num_classes}")
        check_full_precision(model)
        parameter = next(iter(model.parameters()), torch.zeros(()))
        device = parameter.device
        generator = torch.Generator().manual_seed(self.seed)
        # Class by class the same starts: how r_t compares between classes owes nothing to luck.
        one_class = random_starts(self.starts, image_shape, generator=generator, device=device)
        one_class = one_class.to(parameter.dtype)
        network = channels_last(frozen_copy(model, one_class[:1]))
        given = batched_logits(network, one_class[:1]).shape[1]
        require(given == num_classes, f"the model gives logits of {given} classes, not of num_classes={num_classes}")
        at_once = max(1, memory_budget(device) // (COPIES * one_class.nbytes))
        largest, best = list[Tensor](), list[Tensor]()
        for group in torch.arange(num_classes, device=device).split(at_once):
            images = one_class.repeat(len(group), 1, 1, 1).contiguous(memory_format=torch.channels_last)
            classes = group.repeat_interleave(self.starts)
            found = ascend_margins(
                network, classes, images, steps=self.steps, step_size=self.step_size, rule=self.rule, tolerance=self.tolerance,
                autocast=autocast, track=track,
            )  # fmt: skip
            with torch.no_grad():
                logits = torch.cat([network(batch).float() for batch in found.images.split(images_at_once(found.images))])
            reached, place = margin(logits, classes).view(len(group), self.starts).max(1)
            chosen = torch.arange(len(group), device=device) * self.starts + place
            largest.append(reached.cpu())
            best.append(found.images[chosen].contiguous().cpu())
        return torch.cat(largest), torch.cat(best)

    def judge(self, statistics: Tensor) -> MaximumMargins:
        """The same from given statistics (K,)."""
        values = _positive(statistics.double().cpu())
        power = len(values) if self.exponent == "classes" else len(values) - 1
        plain, shape, scale = largest_p_value(values, power)
        p_value = float(plain)
        if self.calibration == "bootstrap":
            generator = torch.Generator().manual_seed(self.seed)
            drawn = gamma_draws(float(shape), (self.simulations, len(values)), generator)
            simulated = largest_p_value(drawn, power)[0]
            p_value = (1 + int((simulated <= plain).sum())) / (self.simulations + 1)
        return MaximumMargins(
            statistics.float().cpu(),
            p_value,
            int(statistics.argmax()),
            p_value <= self.alpha,
            float(plain),
            float(shape),
            float(scale),
        )

    def judge_signed(self, statistics: Tensor) -> MaximumMargins:
        """The same from statistics (K,) of either sign, of which no class has a natural zero.

        A gamma null at location 0 says nothing of those. The largest is judged by how many standard deviations of the others it
        lies above their mean, and p is the share of simulated sets of K normal draws where it lies as far. That finds less than
        the gamma does where all are positive.
        """
        values = statistics.double().cpu()
        _check_finite(values)
        drawn = torch.randn(
            self.simulations, len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed)
        )
        p_value = (1 + int((_beyond_the_others(drawn) >= _beyond_the_others(values)).sum())) / (self.simulations + 1)
        nothing = float("nan")
        found = statistics.float().cpu()
        return MaximumMargins(found, p_value, int(found.argmax()), p_value <= self.alpha, p_value, nothing, nothing)


def maximum_margin_detection(
    model: nn.Module, image_shape: Sequence[int], num_classes: int, *, autocast: torch.dtype | None = None, **settings: Any
) -> MaximumMargins:
    """Whether a classifier has a backdoor, judged without any image (MM-BD).

    Args:
        model: takes images in [0, 1] and gives logits; it is not changed.
        image_shape: (C, H, W) of its images.
        num_classes: how many logits it gives, at least 3.
        autocast: the precision of the search; the margins themselves are fp32. None: that of the model.
        **settings: those of :class:`MaximumMarginTest`.

    Returns:
        The maximum margins, their p-value and the suspect class.

    Raises:
        UserError: for fewer than 3 classes, another number of logits, and wrong settings.
    """
    return MaximumMarginTest(**settings)(model, image_shape, num_classes, autocast=autocast)


def largest_p_value(statistics: Tensor, power: int) -> tuple[Tensor, Tensor, Tensor]:
    """1 - G(largest)^power for sets of positive statistics (..., K), G the gamma fitted to the others, and its shape and scale."""
    ordered = statistics.sort(-1).values
    shape, scale = fit_gamma(ordered[..., :-1])
    beyond = torch.special.gammaincc(shape, ordered[..., -1] / scale)
    return -torch.expm1(power * torch.log1p(-beyond)), shape, scale


def fit_gamma(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum-likelihood shape and scale (...) of gamma distributions at location 0 for sets of positive float64 values (..., n).

    Newton's method on the shape a, from log(a) - digamma(a) = log(mean) - mean(log).
    """
    mean = values.mean(-1)
    spread = (mean.log() - values.log().mean(-1)).clamp_min(1e-9)  # equal values: a shape of 5e8, a spike
    shape = (3 - spread + ((spread - 3) ** 2 + 24 * spread).sqrt()) / (12 * spread)
    for _ in range(8):
        error = shape.log() - torch.digamma(shape) - spread
        shape = (shape - error / (1 / shape - torch.polygamma(1, shape))).clamp(1e-3, 1e9)
    return shape, mean / shape


def gamma_draws(shape: float, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Float64 draws from a gamma distribution of scale 1."""
    draws: Tensor = torch._standard_gamma(torch.full(size, shape, dtype=torch.float64), generator=generator)
    return draws


def _beyond_the_others(statistics: Tensor) -> Tensor:
    """How many standard deviations of the others the largest of (..., K) lies above their mean, (...)."""
    ordered = statistics.sort(-1).values
    others = ordered[..., :-1]
    return (ordered[..., -1] - others.mean(-1)) / others.std(-1).clamp_min(1e-12)


def _check_finite(statistics: Tensor) -> None:
    largest = float(statistics.max())
    require(math.isfinite(largest), f"the model's largest margin is {largest}; it cannot be judged")


def _positive(statistics: Tensor) -> Tensor:
    """Statistics that a gamma at 0 can have: a class that hardly ever wins, or never, counts as a small share of the largest."""
    _check_finite(statistics)
    largest = float(statistics.max())
    return statistics.clamp_min(SMALLEST_SHARE * largest) if largest > 0 else torch.ones_like(statistics)
