"""Images per second of one training epoch: ours, the same steps in a bare loop, and a plain torchvision loop.

    python benchmarks/training.py [--images 4000] [--rounds 3] [--width 16] [--sides lightning returning bare torchvision]

``lightning``: ImageData + PoisonedTraining + Trainer, as train.py runs it. ``returning``: the same, where freed memory goes back to
the system at once (see ``marginclip.allocator``). ``bare``: the same batches, model and precision without Lightning.
``torchvision``: a DataLoader of two workers over a Dataset of PIL images with RandomCrop, RandomHorizontalFlip and ToTensor, fp32,
default memory format. Random images of 32 x 32; ResNet-18. The sides take turns in every round, and each runs in a process of its
own, so that peak memory is its own. Prints medians and ratios. What Lightning and the allocator cost is told by the clock and by the
seconds of processor time, which other jobs on the machine disturb less (with ``OMP_NUM_THREADS=1``, as threads that wait for each
other count as working).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from marginclip.allocator import keep_freed_memory

SIDES = ("lightning", "returning", "bare", "torchvision")
OURS = ("lightning", "bare")  # the sides that keep freed memory, as the entry scripts do
BATCH = 128


class PilImages(Dataset[tuple[Tensor, int]]):
    """The same images as PIL objects with torchvision's usual transforms."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from torchvision import transforms

        self.images = [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in images]
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def make_data(count: int) -> tuple[Tensor, Tensor]:
    """Random uint8 images (count, 3, 32, 32) and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % 10


def ours(count: int, width: int) -> tuple[Any, Any, Any]:
    """The data module and the training module that train.py would build."""
    from marginclip.attacks import AllToOne, BadNet
    from marginclip.data import Augment, ImageData, ImageSet, Splits
    from marginclip.models import ResNet
    from marginclip.training import PoisonedTraining

    images, labels = make_data(count)
    names = tuple(str(label) for label in range(10))
    held_out = ImageSet(images[:200], labels[:200], names)
    data = ImageData(
        Splits(ImageSet(images, labels, names), held_out),
        attack=BadNet(AllToOne(10), (3, 32, 32)),
        augment=Augment(crop_padding=4, flip=True),
        batch_size=BATCH,
        clean_per_class=5,
    )
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)
    return data, PoisonedTraining(ResNet(10, width=width), optimizer=optimizer), optimizer


class Stopwatch:
    """Seconds since it was made, by the clock and of this process's processor time."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.started[0], time.process_time() - self.started[1]


def run_lightning(count: int, width: int) -> tuple[float, float]:
    """Seconds of the second epoch, between its first and its last batch, by the clock and of processor time."""
    import lightning as L

    from marginclip.precision import precision_for
    from marginclip.silence import silence_lightning

    class Clock(L.Callback):
        seconds = (0.0, 0.0)

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.watch = Stopwatch()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.seconds = self.watch.read()

    silence_lightning()
    data, training, _ = ours(count, width)
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=2, precision=precision_for("auto"), callbacks=[clock], logger=False, enable_checkpointing=False,  # type: ignore[arg-type]
        enable_progress_bar=True, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(training, data)
    return clock.seconds


def run_bare(count: int, width: int) -> tuple[float, float]:
    """The same steps without Lightning: seconds of the second epoch."""
    from marginclip.precision import precision_for

    data, training, make = ours(count, width)
    model: nn.Module = training.model
    optimizer = make(model.parameters())
    enabled = precision_for("auto") == "bf16-mixed"
    for epoch in range(2):
        watch = Stopwatch()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            batch = data.on_after_batch_transfer(batch, 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = F.cross_entropy(model(batch["images"]), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return watch.read()


def run_torchvision(count: int, width: int) -> tuple[float, float]:
    """A plain loop over PIL images: seconds of the second epoch."""
    from marginclip.models import ResNet

    loader = DataLoader(PilImages(*make_data(count)), batch_size=BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    model = ResNet(10, width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(2):
        watch = Stopwatch()
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return watch.read()


def main() -> None:
    """Take turns and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        if options.side in OURS:
            keep_freed_memory()
        runner = {"bare": run_bare, "torchvision": run_torchvision}.get(options.side, run_lightning)
        seconds, busy = runner(options.images, options.width)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        sys.stdout.write("\n" + json.dumps({"rate": options.images / seconds, "busy": busy, "peak_mib": peak}))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side in options.sides:
            command = [sys.executable, __file__, "--side", side, "--images", str(options.images), "--width", str(options.width)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    report(found, options.images)


def report(found: dict[str, list[dict[str, float]]], count: int) -> None:
    """Print the table of all sides and the ratios of those that ran."""
    rates = {side: statistics.median(run["rate"] for run in runs) for side, runs in found.items()}
    print("| side | images/s (median, min-max) | processor s per 1,000 images | peak memory (MiB) |\n|---|---|---|---|")
    for side, runs in found.items():
        all_rates = [run["rate"] for run in runs]
        peak, busy = (statistics.median(run[key] for run in runs) for key in ("peak_mib", "busy"))
        print(
            f"| {side} | {rates[side]:.0f} ({min(all_rates):.0f}-{max(all_rates):.0f}) | {1000 * busy / count:.2f} | {peak:.0f} |"
        )
    if {"lightning", "returning"} <= set(found):
        pairs = zip(found["lightning"], found["returning"], strict=True)
        share = statistics.median(kept["busy"] / returned["busy"] for kept, returned in pairs)
        speed = rates["lightning"] / rates["returning"]
        print(f"\nkeeping freed memory trains {speed:.2f} times as fast, in {100 * share:.0f} % of the processor time")
    if {"lightning", "torchvision"} <= set(found):
        print(f"\nours is {rates['lightning'] / rates['torchvision']:.2f} times the plain torchvision loop")
    if {"lightning", "bare"} <= set(found):
        pairs = list(zip(found["bare"], found["lightning"], strict=True))
        clock = statistics.median(bare["rate"] / light["rate"] - 1 for bare, light in pairs)
        busy = statistics.median(light["busy"] / bare["busy"] - 1 for bare, light in pairs)
        print(
            f"\nLightning costs {100 * clock:.1f} % over the bare loop by the clock and {100 * busy:.1f} % of processor time "
            f"(medians of {len(pairs)} pairs)"
        )


if __name__ == "__main__":
    main()
