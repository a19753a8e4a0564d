"""How far repair, detector and training are from the time of their forward and backward passes alone.

    OMP_NUM_THREADS=1 python benchmarks/arithmetic_limit.py [--width 16] [--size 28] [--rounds 3]

Counts the images that go through the network in a repair, in the further repairs of the detector and in training, forward alone and
with their backward pass. Then it times such passes by themselves, in the same process, right before and after. The limit is the sum of
the counted passes times their measured time. The ratio says how much the rest costs: Lightning, Adam, checks, random numbers, copies.
In a repair the passes are those of the bounded network: its bounds have gradients, its weights have none. Random images and weights:
neither changes time. Seconds are of the processor where ``OMP_NUM_THREADS=1``, so that other jobs on the machine disturb little; else
of the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.allocator import keep_freed_memory
from marginclip.attacks import AllToOne, BadNet
from marginclip.clipping import BoundedNetwork
from marginclip.data import Augment, ImageData, ImageSet, Splits
from marginclip.defenses import MMAC, cross_fitted_logits
from marginclip.models import ResNet
from marginclip.silence import silence_lightning, silent_trainer
from marginclip.training import PoisonedTraining

clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter


@dataclass
class Counts:
    """Images by kind of pass."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counting(kind: type[nn.Module]) -> Any:
    """Count the images that go through networks of a class while the context lasts."""
    counts = Counts()

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, kind):
            images = inputs[0]
            followed = torch.is_grad_enabled()
            counts.backward += len(images) if followed else 0
            counts.forward += 0 if followed else len(images)

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = clock()
    work()
    return clock() - start


def pass_seconds(network: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Seconds an image of a forward pass, and of one with its backward pass."""

    def forward() -> None:
        with torch.no_grad():
            network(images)

    def backward() -> None:
        network.zero_grad(set_to_none=True)
        loss(network(images)).backward()

    forward()
    backward()
    times = [(seconds_of(forward), seconds_of(backward)) for _ in range(9)]
    return statistics.median(first for first, _ in times) / len(images), statistics.median(both for _, both in times) / len(
        images
    )


def compare(
    work: Callable[[], object], kind: type[nn.Module], units: Callable[[], tuple[float, float]]
) -> tuple[float, float, Counts]:
    """Seconds of the work, and those of its passes alone."""
    before = units()
    with counting(kind) as counts:
        taken = seconds_of(work)
    after = units()
    forward, backward = (statistics.mean(pair) for pair in zip(before, after, strict=True))
    return taken, counts.forward * forward + counts.backward * backward, counts


def victim_data(images: Tensor, labels: Tensor) -> ImageData:
    """Images with BadNet on a tenth of them, as train.py would train on them."""
    stored = (images * 255).round().to(torch.uint8)
    names = tuple(str(label) for label in range(10))
    return ImageData(
        Splits(ImageSet(stored, labels, names), ImageSet(stored[:200], labels[:200], names)),
        attack=BadNet(AllToOne(10), tuple(images.shape[1:])), augment=Augment(crop_padding=2, flip=False), batch_size=128,
        clean_per_class=5,
    )  # fmt: skip


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    silence_lightning()
    keep_freed_memory()
    torch.manual_seed(0)
    model = ResNet(10, blocks=(1, 1, 1), width=given.width).eval().to(memory_format=torch.channels_last)
    pool = torch.rand(80 * given.per_class, 3, given.size, given.size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        model.train()(pool[:500])  # batch norms of a trained network
        model.eval()
        labels = torch.cat([model(part).argmax(1) for part in pool.split(500)])
    images, targets = pool[: 10 * given.per_class], labels[: 10 * given.per_class]

    bounded = BoundedNetwork(model, images[:1]).to(memory_format=torch.channels_last)
    bounded.set_from_images(images, share=0.4)
    bounded = bounded.fused()

    def bounds_units() -> tuple[float, float]:
        return pass_seconds(bounded, images[:100], lambda logits: logits.square().mean())

    def train_units() -> tuple[float, float]:
        network = ResNet(10, blocks=(1, 1, 1), width=given.width).to(memory_format=torch.channels_last).train()
        return pass_seconds(network, pool[:128], lambda logits: F.cross_entropy(logits, labels[:128]))

    def repair() -> None:
        MMAC(steps=30, extra_steps=0).fit(model, images, targets, make_trainer=silent_trainer)

    def detector() -> None:
        cross_fitted_logits(MMAC(steps=30, extra_steps=0), model, images, targets)

    def train() -> None:
        trained = PoisonedTraining(
            ResNet(10, blocks=(1, 1, 1), width=given.width),
            optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
        )
        silent_trainer(2).fit(trained, victim_data(pool, torch.arange(len(pool)) % 10))

    print("| work | s | its passes alone | ratio (every round) | images forward | and backward |\n|---|---|---|---|---|---|")
    for name, work, kind, units in (
        ("repair, 30 steps", repair, BoundedNetwork, bounds_units),
        ("detector, two repairs of half of the images", detector, BoundedNetwork, bounds_units),
        ("training, two epochs", train, ResNet, train_units),
    ):
        rounds = [compare(work, kind, units) for _ in range(given.rounds)]
        ratios = [taken / limit for taken, limit, _ in rounds]
        taken, limit, counts = rounds[ratios.index(statistics.median_low(ratios))]
        every = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {taken:.1f} | {limit:.1f} | {every} | {counts.forward} | {counts.backward} |", flush=True)


if __name__ == "__main__":
    main()
