"""Trigger inversion of Neural Cleanse (Wang et al., S&P 2019): the smallest patch that sends every image to a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.errors import require
from marginclip.networks.memory import images_that_fit, memory_budget

MAD_TO_SIGMA = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
SMALLEST_SPAN = 1e-6  # keeps the inverse of tanh finite


class CostSchedule:
    """The weight of the mask's size for one class, moved by how well the trigger works.

    ``value`` is 0 until the success rate has been at ``threshold`` for ``patience`` passes running, then ``initial``. From there
    on ``patience`` passes running at the threshold double it, and as many below divide it by 2^1.5. ``best`` is the smallest size
    that came with a rate at the threshold; ``done`` once the weight has gone both up and down and ``5 patience`` passes did not
    improve on it.
    """

    def __init__(self, *, initial: float = 1e-3, threshold: float = 0.99, patience: int = 5) -> None:
        self.initial, self.threshold, self.patience = initial, threshold, patience
        self.value, self.best = 0.0, float("inf")
        self._above = self._below = self._stale = 0
        self._raised = self._lowered = False

    @property
    def done(self) -> bool:
        """Whether the search can end."""
        return self._raised and self._lowered and self._stale >= 5 * self.patience

    def update(self, rate: float, size: float) -> bool:
        """Take the success ``rate`` and the mask's ``size`` of a pass; returns whether this is the best trigger so far."""
        works = rate >= self.threshold
        improved = works and size < self.best
        self.best = size if improved else self.best
        self._stale = 0 if improved or self.best == float("inf") else self._stale + 1
        self._above, self._below = (self._above + 1, 0) if works else (0, self._below + 1)
        if self.value == 0:  # its own stage: once the weight is there, nothing sets it back to the initial one
            if self._above >= self.patience:
                self.value, self._above, self._below = self.initial, 0, 0
        elif self._above >= self.patience:
            self.value, self._above, self._raised = 2 * self.value, 0, True
        elif self._below >= self.patience:
            self.value, self._below, self._lowered = self.value / 2**1.5, 0, True
        return improved


@dataclass(frozen=True)
class InversionPlan:
    """How triggers are inverted: all classes in one batch, each with a mask, a pattern and a weight of the mask's size of its own.

    Args:
        passes: passes at most.
        batches_per_pass: batches in a pass.
        batch_size: clean images in a batch, each for every class.
        learning_rate: of Adam.
        betas: of Adam.
        cost: first weight of the mask's size; see :class:`CostSchedule`.
        threshold: share of the images that a trigger must send to its class.
        patience: passes running before the weight moves.
    """

    passes: int = 100
    batches_per_pass: int = 31
    batch_size: int = 32
    learning_rate: float = 0.1
    betas: Sequence[float] = (0.5, 0.9)
    cost: float = 1e-3
    threshold: float = 0.99
    patience: int = 5

    def __post_init__(self) -> None:
        for key in ("passes", "batches_per_pass", "batch_size", "patience"):
            require(getattr(self, key) >= 1, f"defense.inversion.{key} must be at least 1, got {getattr(self, key)}")
        for key in ("learning_rate", "cost"):
            require(getattr(self, key) > 0, f"defense.inversion.{key} must be positive, got {getattr(self, key):g}")
        require(0 < self.threshold <= 1, f"defense.inversion.threshold must be in (0, 1], got {self.threshold:g}")


@dataclass(frozen=True)
class InvertedTriggers:
    """Inverted triggers of n ``classes``: ``masks`` (n, 1, H, W) and ``patterns`` (n, C, H, W) in [0, 1], the share of images that
    each sends to its class (``rates``), and the passes that it took. ``x' = (1 - mask) x + mask pattern``."""

    classes: list[int]
    masks: Tensor
    patterns: Tensor
    rates: list[float]
    passes: list[int]

    @property
    def sizes(self) -> Tensor:
        """The L1 norm of every mask (n,): how many pixels the trigger needs."""
        return self.masks.flatten(1).abs().sum(1)


def paste(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """New images (N, C, H, W) that carry the trigger: ``(1 - mask) x + mask pattern``."""
    return (1 - mask) * images + mask * pattern


@dataclass
class _Search:
    """The search's state for all classes: raw values (before tanh), the best trigger so far, and the schedules."""

    raw_masks: Tensor
    raw_patterns: Tensor
    masks: Tensor
    patterns: Tensor
    rates: list[float]
    passes: list[int]
    schedules: list[CostSchedule] = field(default_factory=list)

    def triggers(self, active: Tensor) -> tuple[Tensor, Tensor]:
        return _to_unit(self.raw_masks[active]), _to_unit(self.raw_patterns[active])


def invert_triggers(
    network: nn.Module, images: Tensor, classes: Sequence[int], plan: InversionPlan, *, seed: int = 0
) -> InvertedTriggers:
    """For each class the smallest mask and a pattern that send clean ``images`` (N, C, H, W) in [0, 1] to it.

    Minimises CE(f((1 - m) x + m p), t) + cost |m|_1 by Adam, with m = tanh(a) / 2 + 1/2 and p alike. All classes are in one batch
    and their losses are summed. Adam works value by value, so that is the same as one search for each. Where they do not fit into the
    memory budget, they go through the network one part after the other. A class whose schedule is done leaves the batch. ``network``
    must be frozen and in evaluation mode. Where no pass reached the threshold, the last trigger stands.
    """
    search = _start(images, len(classes), plan, seed)
    wanted = torch.tensor(list(classes), device=images.device)
    optimizer = torch.optim.Adam([search.raw_masks, search.raw_patterns], plan.learning_rate, (plan.betas[0], plan.betas[1]))
    generator = torch.Generator().manual_seed(seed)
    count, size = len(images), min(plan.batch_size, len(images))
    at_once = max(1, images_that_fit(network, images[:1], network, memory_budget(images.device)) // size)  # classes
    for _ in range(plan.passes):
        active = torch.tensor([k for k, schedule in enumerate(search.schedules) if not schedule.done], device=images.device)
        if len(active) == 0:
            break
        costs = torch.tensor([search.schedules[k].value for k in active.tolist()], device=images.device)
        hits, sizes = torch.zeros(len(active), device=images.device), torch.zeros(len(active), device=images.device)
        for _ in range(plan.batches_per_pass):
            batch = images[torch.randperm(count, generator=generator)[:size].to(images.device)]
            optimizer.zero_grad()
            for rows in torch.arange(len(active), device=images.device).split(at_once):
                with torch.enable_grad():
                    masks, patterns = search.triggers(active[rows])
                    loss, hit = _loss(network, batch, masks, patterns, wanted[active[rows]], costs[rows])
                    loss.backward(inputs=[search.raw_masks, search.raw_patterns])
                hits[rows] += hit
                sizes[rows] += masks.detach().flatten(1).sum(1)
            # Adam goes on moving classes that are done, by its momentum alone; their trigger is kept apart.
            optimizer.step()
        _note(search, active.tolist(), hits / plan.batches_per_pass, sizes / plan.batches_per_pass)
    return InvertedTriggers(list(classes), search.masks.cpu(), search.patterns.cpu(), search.rates, search.passes)


def anomaly_indices(sizes: Tensor) -> Tensor:
    """How far each size (n,) lies under the median, in robust standard deviations: (median - L) / (1.4826 MAD), (n,).

    Negative above the median. Where the MAD is 0 there is no scale to judge by, and every index is 0.
    """
    sizes = sizes.double()
    median = sizes.quantile(0.5)
    deviation = MAD_TO_SIGMA * (sizes - median).abs().quantile(0.5)
    return (median - sizes) / deviation if float(deviation) > 0 else torch.zeros_like(sizes)


def _start(images: Tensor, num: int, plan: InversionPlan, seed: int) -> _Search:
    """Masks and patterns uniform in [0, 1], drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed + 6700417)
    channels, height, width = images.shape[1:]
    masks = torch.rand(num, 1, height, width, generator=generator).to(images.device)
    patterns = torch.rand(num, channels, height, width, generator=generator).to(images.device)
    raw = [torch.atanh((2 * value - 1) * (1 - SMALLEST_SPAN)).requires_grad_() for value in (masks, patterns)]
    schedules = [CostSchedule(initial=plan.cost, threshold=plan.threshold, patience=plan.patience) for _ in range(num)]
    return _Search(raw[0], raw[1], masks.clone(), patterns.clone(), [0.0] * num, [0] * num, schedules)


def _to_unit(raw: Tensor) -> Tensor:
    return raw.tanh() / 2 + 0.5


def _loss(
    network: nn.Module, batch: Tensor, masks: Tensor, patterns: Tensor, wanted: Tensor, costs: Tensor
) -> tuple[Tensor, Tensor]:
    """The summed loss of all classes, and the share of the batch that each sends to its class (n,)."""
    triggered = paste(batch.unsqueeze(0), masks.unsqueeze(1), patterns.unsqueeze(1))  # (n, B, C, H, W)
    flat = triggered.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    logits = network(flat).float().view(len(wanted), len(batch), -1)
    labels = wanted.unsqueeze(1).expand(-1, len(batch))
    data = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    loss = (data + costs * masks.flatten(1).sum(1)).sum()
    return loss, (logits.argmax(2) == labels).float().mean(1)


@torch.no_grad()
def _note(search: _Search, active: list[int], rates: Tensor, sizes: Tensor) -> None:
    """Move the schedules, and keep the triggers that are the best so far (or the last, where none has worked yet)."""
    masks, patterns = search.triggers(torch.tensor(active, device=rates.device))
    for row, k in enumerate(active):
        improved = search.schedules[k].update(float(rates[row]), float(sizes[row]))
        search.passes[k] += 1
        if improved or search.schedules[k].best == float("inf"):
            search.masks[k], search.patterns[k], search.rates[k] = masks[row], patterns[row], float(rates[row])
