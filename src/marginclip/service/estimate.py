"""How long a repair or an audit will take, and in how much memory, told from a few images that are timed before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses.clipping.passes import Passes
from marginclip.durations import duration
from marginclip.networks.memory import OVERHEAD, kept_for_backward, memory_budget

LONG_ENOUGH, MOST_TIMED = 0.3, 32  # seconds, images
COPIES = 4  # of the weights: the model, its bounded copy, that with folded batch norms, a repair that is kept


@dataclass(frozen=True)
class Speed:
    """Seconds that an image takes, ``forward`` alone and with its ``backward`` pass; ``kept`` bytes for the latter; the ``fixed`` bytes of
    weights, and the ``budget``, in bytes."""

    forward: float
    backward: float
    kept: int
    fixed: int
    budget: int

    def seconds(self, passes: Passes) -> float:
        """What these passes take, about."""
        again = self.forward if passes.at_once * self.per_image > self.budget else 0.0  # parts are computed again
        return passes.forward * self.forward + passes.backward * (self.backward + again)

    def memory(self, passes: Passes) -> int:
        """The largest number of bytes that these passes need, about."""
        return self.fixed + min(max(self.budget, self.per_image), passes.at_once * self.per_image)

    @property
    def per_image(self) -> int:
        """Bytes that an image needs at the peak of its backward pass."""
        return OVERHEAD * self.kept


def measure(model: nn.Module, images: Tensor) -> Speed:
    """Time the bounded network on some of ``images`` (N, C, H, W), on their device; it takes a second, more for large models."""
    device = images.device
    network = BoundedNetwork(model, images[:1]).fused().to(device)
    one, two = (kept_for_backward(network, images[:1].to(device).expand(count, -1, -1, -1), network) for count in (1, 2))
    kept, budget = max(1, two - one), memory_budget(device)
    few = min(2, len(images))
    for count in (few, min(MOST_TIMED, len(images), max(few, budget // (OVERHEAD * kept)))):
        batch = images[:count].to(device)
        forward, backward = _timed(network, batch, gradients=False), _timed(network, batch, gradients=True)
        if forward + backward > LONG_ENOUGH:
            break
    weights = sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))
    fixed = COPIES * weights + images.numel() * images.element_size()
    return Speed(forward / len(batch), backward / len(batch), kept, fixed, budget)


def in_words(speed: Speed, passes: Passes, longest: Passes | None = None) -> str:
    """One sentence: the time, that of the ``longest`` course where it is another one, and the memory."""
    usual, most = (max(1.0, speed.seconds(each)) for each in (passes, longest or passes))
    at_most = f" (up to {duration(most)} where bounds that keep the accuracy are hard to find)" if most > 1.2 * usual else ""
    return (
        f"this takes about {duration(usual)}{at_most} and {speed.memory(passes) / 2**30:.1f} GiB beside what is in use "
        f"(memory_gib limits a step to {speed.budget / 2**30:.1f} GiB)"
    )


def _timed(network: nn.Module, batch: Tensor, *, gradients: bool) -> float:
    with torch.set_grad_enabled(gradients):
        network(batch[:1])
        started = time.perf_counter()
        logits = network(batch.clone().requires_grad_(gradients))
        if gradients:
            logits.sum().backward()
            network.zero_grad(set_to_none=True)
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        return time.perf_counter() - started
