"""Where bounds should win over biases: MMOM and MMAC beside biases, temperature and the last layer, after four faults of training.

    python benchmarks/training_faults.py
    python benchmarks/training_faults.py --images cifar10 --root data/cifar10-images

Each fault makes victims of its own, one for each seed. The clean set has 50 faultless images a class. docs/results/training_faults.md
states the hypotheses, and was written before the first run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from PIL import ImageColor
from torch import Tensor, nn

from marginclip.data import Augment, ImageData, ImageSet, Splits
from marginclip.experiment.command import plain
from marginclip.experiment.process import prepare_process
from marginclip.experiment.setup import VictimSetup, build_model, load_splits
from marginclip.experiment.spec import RunSpec, run_spec
from marginclip.experiment.trainers import build_trainer
from marginclip.experiment.victim import make_training
from marginclip.files import write_whole
from marginclip.metrics import CalibrationScores
from marginclip.networks.logits import batched_logits
from marginclip.silence import SILENT, silence_lightning

CONF = Path(__file__).parents[1] / "conf"
IMAGES = {
    "mnist_m": "dataset=mnist_m attack=none",
    "cifar10": "experiment=cifar10_lt_folder_small imbalance=none attack=none training.epochs=20 reserve_per_class=auto",
}
METHODS = {
    "no repair": "defense=none",
    "bias only": "defense=bias_only",
    "bias-corrected temperature": "defense=bias_corrected_temperature",
    "vector scaling": "defense=vector_scaling",
    "last layer": "defense=last_layer",
    "fine-tuning": "defense=finetune",
    "MMOM": "defense=mmom",
    "MMOM, `mmom_paper`": "defense=mmom defense/schedule=mmom_paper",
    "MMAC": "defense=mmac",
}
TRAINING_IMAGES = 10_000  # at most
CLEAN_PER_CLASS = 50
NOISE_SHARE, PATCH_SHARE, RARITY = 0.3, 0.95, 20
PATCH_SIDE, NOISE_SCALE, BLUR_SCALE = 4, 0.1, 1.0
COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan", "orange", "purple", "white", "black")  # of the classes' patches


@dataclass(frozen=True)
class Fault:
    """What goes wrong in training, for how many times the usual epochs, and on which evaluation images it is seen.

    ``views`` give, for evaluation images (N, C, H, W) in [0, 1] with their original labels (N,), the images of each kind by its name; a
    view may take a part of them by a mask.
    """

    spoil: Callable[[Splits, int], Splits]
    views: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]
    epochs: int = 1


def unchanged(splits: Splits, seed: int) -> Splits:
    """The training images as they are: the fault is long training alone."""
    return splits


def mislabelled(splits: Splits, seed: int) -> Splits:
    """A random share of the training labels moved to a random other class."""
    train, generator = splits.train, torch.Generator().manual_seed(seed + 11)
    rows = torch.rand(len(train), generator=generator) < NOISE_SHARE
    moved = (train.labels + torch.randint(1, len(train.classes), (len(train),), generator=generator)) % len(train.classes)
    return replace(splits, train=replace(train, labels=torch.where(rows, moved, train.labels)))


def with_patches(splits: Splits, seed: int) -> Splits:
    """Most training images carry a patch whose colour is that of their class."""
    train = splits.train
    images = train.images[torch.arange(len(train))].clone()
    rows = torch.rand(len(train), generator=torch.Generator().manual_seed(seed + 13)) < PATCH_SHARE
    images[rows] = patched(images[rows], train.labels[rows])
    return replace(splits, train=replace(train, images=images))


def patched(images: Tensor, classes: Tensor) -> Tensor:
    """Copies of images (N, 3, H, W), of bytes or in [0, 1], with the patches of ``classes`` (N,) in the lower right corner."""
    colours = torch.tensor([ImageColor.getrgb(name) for name in COLOURS], dtype=torch.uint8)[classes].view(-1, 3, 1, 1)
    marked = images.clone()
    marked[:, :, -PATCH_SIDE:, -PATCH_SIDE:] = colours if images.dtype == torch.uint8 else colours / 255
    return marked


def with_rare_halves(splits: Splits, seed: int) -> Splits:
    """Half as many classes: each is two of the old ones, of which the second is rare in training."""
    half = len(splits.train.classes) // 2
    names = tuple(
        f"{first} or {second}" for first, second in zip(splits.train.classes[:half], splits.train.classes[half:], strict=True)
    )
    train, generator = splits.train, torch.Generator().manual_seed(seed + 17)
    kept = ((train.labels < half) | (torch.rand(len(train), generator=generator) < 1 / RARITY)).nonzero().flatten()
    few = ImageSet(train.images[kept], train.labels[kept] % half, names)
    held_out = splits.held_out
    return Splits(few, ImageSet(held_out.images, held_out.labels % half, names))


def blurred(images: Tensor) -> Tensor:
    """Images (N, C, H, W) under a Gaussian blur."""
    offsets = torch.arange(-3, 4, dtype=torch.float32)
    line = (-(offsets**2) / (2 * BLUR_SCALE**2)).exp()
    line = line / line.sum()
    channels = images.shape[1]
    kernel = torch.outer(line, line).expand(channels, 1, 7, 7)
    return F.conv2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), kernel, groups=channels)


def noisy(images: Tensor) -> Tensor:
    """Images (N, C, H, W) under Gaussian noise."""
    return (images + NOISE_SCALE * torch.randn(images.shape, generator=torch.Generator().manual_seed(19))).clamp(0, 1)


def plain_view(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, torch.ones_like(labels, dtype=torch.bool)


FAULTS = {
    "30 % wrong labels, 3 x the epochs": Fault(mislabelled, {"plain": plain_view}, epochs=3),
    "a patch of its class's colour": Fault(
        with_patches,
        {
            "plain": plain_view,
            "the next class's patch": lambda images, labels: (patched(images, (labels + 1) % 10), labels >= 0),
        },
    ),
    "3 x the epochs": Fault(
        unchanged,
        {
            "plain": plain_view,
            "blur": lambda images, labels: (blurred(images), labels >= 0),
            "noise": lambda images, labels: (noisy(images), labels >= 0),
        },
        epochs=3,
    ),
    "classes with a rare half": Fault(
        with_rare_halves,
        {"plain": plain_view, "rare halves": lambda images, labels: (images, labels >= 5)},
    ),
}


def settings_of(options: str) -> RunSpec:
    """The settings of ``marginclip defend`` with these options."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("defend", [*options.split(), "logger=none", "trainer.enable_progress_bar=false"])
    return run_spec(plain(config))


def trained(spec: RunSpec, fault: Fault) -> tuple[nn.Module, Splits, Splits, ImageData]:
    """A victim of the fault, the data before and after it, and the data module."""
    before = load_splits(spec)
    index = torch.randperm(len(before.train), generator=torch.Generator().manual_seed(23))[:TRAINING_IMAGES].sort().values
    before = replace(before, train=ImageSet(before.train.images[index], before.train.labels[index], before.train.classes))
    splits = fault.spoil(before, spec.seed)
    augment, batch_size = Augment(**spec.dataset.augment), spec.training.batch_size
    data = ImageData(splits, augment=augment, batch_size=batch_size, clean_per_class=CLEAN_PER_CLASS, seed=spec.seed)
    model = build_model(spec, len(splits.train.classes), splits.image_shape)
    training = make_training(spec, VictimSetup(splits, None, data, model))
    build_trainer(spec.trainer, max_epochs=fault.epochs * spec.training.epochs, **SILENT).fit(training, data)
    return model.eval(), before, splits, data


def measured(options: str, fault: Fault, seed: int, methods: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """ACC, ECE (%) and NLL of each method on each view, of one victim, which is trained first."""
    spec = settings_of(f"{options} seed={seed} defense=none")
    prepare_process(spec.trainer.threads)
    model, before, splits, data = trained(spec, fault)
    clean, evaluated = data.clean_set(), data.eval_index
    images = splits.held_out.images[evaluated].float() / 255
    labels, original = splits.held_out.labels[evaluated], before.held_out.labels[evaluated]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in methods:
        method = settings_of(f"{options} seed={seed} {METHODS[name]}")
        network = model if method.defense is None else method.defense.choice.make(seed=seed).fit(
            model, *clean, make_trainer=lambda epochs: build_trainer(spec.trainer, max_epochs=epochs, **SILENT)
        ).network  # fmt: skip
        found[name] = {}
        for view, shown in fault.views.items():
            seen, mask = shown(images, original)
            logits = batched_logits(network, seen[mask])
            scores = CalibrationScores(logits.shape[1])
            scores.update(logits, labels[mask])
            calibration = scores.scores()
            accuracy = float((logits.argmax(1) == labels[mask]).float().mean())
            found[name][view] = {"acc": 100 * accuracy, "ece": 100 * calibration["ece"], "nll": calibration["nll"]}
    return found


def table(name: str, fault: Fault, seeds: list[dict[str, Any]]) -> None:
    """Mean +- sample deviation over the seeds: ACC with ECE in brackets."""
    print(
        f"\n{name}, {len(seeds)} seeds, ACC (ECE):\n\n| method | {' | '.join(fault.views)} |\n|---|{'---|' * len(fault.views)}"
    )
    for method in METHODS:
        if not all(method in found for found in seeds):
            continue
        cells = []
        for view in fault.views:
            accuracy = [found[method][view]["acc"] for found in seeds]
            spread = f" +- {statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
            ece = statistics.mean(found[method][view]["ece"] for found in seeds)
            cells.append(f"{statistics.mean(accuracy):.1f}{spread} ({ece:.1f})")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", choices=IMAGES, default="mnist_m")
    parser.add_argument("--root", default="data/cifar10-images", help="the folder of images, for --images cifar10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--methods", default="", help="methods whose name contains this")
    parser.add_argument("--output", default="training_faults.json", help="all results; what is there is not done again")
    given = parser.parse_args()
    silence_lightning()
    output = Path(given.output)
    done: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    options = IMAGES[given.images] + (f" dataset.root={given.root}" if given.images == "cifar10" else "")
    for name, fault in FAULTS.items():
        if given.only not in name:
            continue
        for seed in range(given.seeds):
            key = f"{given.images}, {name}, seed {seed}"
            missing = [method for method in METHODS if given.methods in method and method not in done.get(key, {})]
            if missing:
                done[key] = done.get(key, {}) | measured(options, fault, seed, missing)
                write_whole(output, lambda partial: partial.write_text(json.dumps(done)))
        table(f"{given.images}, {name}", fault, [done[f"{given.images}, {name}, seed {seed}"] for seed in range(given.seeds)])


if __name__ == "__main__":
    main()
