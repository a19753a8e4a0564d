"""Classification margins, and the search for inputs that maximise them (margin ascent)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marginclip.errors import UserError, require
from marginclip.networks.memory import kept_for_backward
from marginclip.networks.memory import memory_budget as budget_of

ASCENT_RULES = ("raw", "unit_norm", "unit_rms", "sign")


def margin(logits: Tensor, classes: Tensor) -> Tensor:
    """Gap between a class's logit and the best other one (the bracket in Eq. 3 of the MMAC paper).

    The maximum leaves the class itself out.

    Args:
        logits: (N, K).
        classes: the class of each row, (N,) int64 in [0, K).

    Returns:
        The margins (N,), in logits; positive where the class wins.

    Examples:
        >>> margin(torch.tensor([[4.0, 1.0, 0.0], [4.0, 1.0, 0.0]]), torch.tensor([0, 1])).tolist()
        [3.0, -3.0]
    """
    own = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    best_other = logits.scatter(1, classes.unsqueeze(1), float("-inf")).amax(1)
    return own - best_other


@dataclass(frozen=True)
class MarginAscent:
    """The outcome of a search.

    Args:
        images: the image of largest margin on the way from each start, (N, C, H, W).
        margins: their margins (N,), in logits.
        initial_margins: the margins of the starts (N,), in logits.
        steps: steps taken, by the chunk that took the most.
    """

    images: Tensor
    margins: Tensor
    initial_margins: Tensor
    steps: int


def random_starts(
    count: int, shape: Sequence[int], *, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Images of noise, drawn on the CPU so that every device starts alike.

    Args:
        count: how many images.
        shape: (C, H, W) of an image.
        generator: what they are drawn from, on the CPU.
        device: where they are sent.

    Returns:
        Images (count, C, H, W), uniform in [0, 1].
    """
    return torch.rand((count, *shape), generator=generator).to(device)


def ascend_margins(
    model: nn.Module,
    classes: Tensor,
    starts: Tensor,
    *,
    steps: int = 300,
    step_size: float = 0.01,
    rule: str = "raw",
    momentum: float = 0.0,
    tolerance: float = 0.0,
    patience: int = 10,
    memory_budget: int | None = None,
    autocast: torch.dtype | None = None,
    track: Callable[[range], Iterable[int]] = iter,
) -> MarginAscent:
    """Projected gradient ascent on the margins of ``classes`` from ``starts``, all at once or in chunks that fit into memory.

    Every image climbs on its own margin; after each step it is projected back to the feasible space [0, 1] (so saturated pixels
    keep their gradient, unlike with a clamp inside the model). The image of largest margin on the way is kept, so the result
    never lies under its start. Gradients reach neither weights nor bounds, and it works under ``torch.no_grad`` and
    ``torch.inference_mode``.

    Args:
        model: images to logits. The search puts it into evaluation mode, so that images do not influence each other, and then
            back into the mode that it was in.
        classes: the class that each image climbs for, (N,) int64 in [0, K).
        starts: where the images start, (N, C, H, W) in [0, 1].
        steps: most steps that an image takes, from 0 up.
        step_size: what the direction is multiplied by in a step, positive.
        rule: how the gradient becomes a direction: ``raw`` (the published script: step 0.01), ``unit_norm`` (L2 norm 1 for each
            image: the step is a distance), ``unit_rms`` (root mean square 1: the step means the same at every image size) or
            ``sign``.
        momentum: share of the last move that is added to the direction, in [0, 1).
        tolerance: the search of a chunk ends early when its mean best margin has grown by less, relative to itself, over
            ``patience`` steps. 0: never.
        patience: steps, at least 1, that ``tolerance`` looks back over.
        memory_budget: limit of what a chunk keeps for its backward pass, in bytes. None: 1 GiB on the CPU, a quarter of the
            free memory on a GPU, and no more than :func:`~marginclip.networks.memory.memory_budget`.
        autocast: the dtype of mixed precision. None: the caller's autocast stays as it is.
        track: goes through the steps of a chunk, and can show how far it is.

    Returns:
        The best images and their margins.

    Raises:
        UserError: for a setting outside its range, and for another number of classes than of starts.
    """
    require(rule in ASCENT_RULES, f"ascent rule must be one of {', '.join(ASCENT_RULES)}, got '{rule}'")
    require(steps >= 0 and step_size > 0, f"ascent needs steps >= 0 and step_size > 0, got {steps} and {step_size:g}")
    require(0 <= momentum < 1, f"ascent momentum must be in [0, 1), got {momentum:g}")
    require(len(classes) == len(starts), f"one class a start is needed, got {len(classes)} classes and {len(starts)} starts")
    require(
        tolerance >= 0 and patience >= 1, f"ascent needs tolerance >= 0 and patience >= 1, got {tolerance:g} and {patience}"
    )
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            search = _Search(model, steps, step_size, rule, momentum, tolerance, patience, autocast, track)
            # Clones made outside inference mode are ordinary tensors, whatever the caller's mode was.
            starts, classes = starts.detach().clone(), classes.detach().clone()
            chunk = _chunk_size(search, starts, classes, memory_budget)
            parts = [
                search.run(images, wanted) for images, wanted in zip(starts.split(chunk), classes.split(chunk), strict=True)
            ]
    finally:
        for module in training:
            module.training = True
    return MarginAscent(
        torch.cat([part.images for part in parts]),
        torch.cat([part.margins for part in parts]),
        torch.cat([part.initial_margins for part in parts]),
        max(part.steps for part in parts),
    )


@dataclass
class _Search:
    """The settings of one search, and its loop over the steps of a chunk."""

    model: nn.Module
    steps: int
    step_size: float
    rule: str
    momentum: float
    tolerance: float
    patience: int
    autocast: torch.dtype | None
    track: Callable[[range], Iterable[int]] = iter

    def margins(self, images: Tensor, classes: Tensor) -> Tensor:
        with nullcontext() if self.autocast is None else torch.autocast(images.device.type, dtype=self.autocast):
            logits = self.model(images)
        return margin(logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits, classes)

    def run(self, images: Tensor, classes: Tensor) -> MarginAscent:
        velocity = torch.zeros_like(images)
        history: list[float] = []
        best_images, best, initial = images, None, None
        for step in self.track(range(self.steps + 1)):
            images = images.detach().requires_grad_(step < self.steps)
            with torch.set_grad_enabled(step < self.steps):  # nothing is learned from the last pass
                values = self.margins(images, classes)
            current = values.detach()
            if best is None or initial is None:
                best = initial = current
            better = current > best
            best = torch.where(better, current, best)
            best_images = torch.where(better.view(-1, 1, 1, 1), images.detach(), best_images)
            if step == self.steps or self._stalled(history, best):
                break
            (gradient,) = torch.autograd.grad(values.sum(), images)
            velocity = self.momentum * velocity + self._direction(gradient)
            images = (images.detach() + self.step_size * velocity).clamp(0, 1)
        assert best is not None and initial is not None
        return MarginAscent(best_images, best, initial, step)

    def _direction(self, gradient: Tensor) -> Tensor:
        if self.rule == "raw":
            return gradient
        if self.rule == "sign":
            return gradient.sign()
        norms: Tensor = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        unit = gradient / norms.view(-1, 1, 1, 1)
        return unit * math.sqrt(gradient[0].numel()) if self.rule == "unit_rms" else unit

    def _stalled(self, history: list[float], best: Tensor) -> bool:
        if self.tolerance <= 0:
            return False
        history.append(float(best.mean()))
        if len(history) <= self.patience:
            return False
        before, now = history[-1 - self.patience], history[-1]
        return now - before < self.tolerance * max(abs(before), 1e-6)


def _chunk_size(search: _Search, starts: Tensor, classes: Tensor, memory_budget: int | None) -> int:
    """How many images fit the budget, by what an image keeps for its backward pass."""
    if memory_budget is None:
        free = budget_of(starts.device)
        memory_budget = free // 2 if starts.device.type == "cuda" else min(2**30, free)
    if memory_budget < 1:
        raise UserError(f"memory_budget must be positive, got {memory_budget} bytes")
    two, wanted = starts[:1].expand(2, -1, -1, -1), classes[:1].expand(2)  # some models squeeze a batch of one away
    kept = kept_for_backward(search.model, two, lambda images: search.margins(images, wanted)) / 2
    return max(1, int(memory_budget / max(1, kept)))
