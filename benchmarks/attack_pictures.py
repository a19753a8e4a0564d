"""Draw the pictures of the pages about attacks that need a trained network, from victims and runs that are there or are made now.

    python defend.py -m attack=adaptive attack.beta=0.5,1,5,10
    python defend.py -m attack=adaptive attack.unbounded_weight=1 attack.beta=0.5,1,5,10
    python benchmarks/attack_pictures.py --runs-dir runs

``attack_input_aware.png`` and ``attack_clean_label.png`` take CIFAR-10 images in folders; their victim and surrogate are
found in the store or trained first. ``attack_adaptive.png`` takes the finished runs of the two commands above.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from method_pictures import show
from torch import Tensor
from verdicts import obtained, specified

from marginclip.attacks import CleanLabel, InputAware
from marginclip.attacks.clean_label import pgd
from marginclip.experiment.setup import build_setup
from marginclip.experiment.training_access import AttackerAccess
from marginclip.experiment.victim import obtain_victim
from marginclip.record import RunRecord
from marginclip.reporting.examples import amplification
from marginclip.reporting.figures import save_png
from marginclip.reporting.style import AFTER, BEFORE, NEUTRAL, new_figure, tidy
from marginclip.reporting.summary import load_records

INPUT_AWARE = "experiment=cifar10_folder_small attack=input_aware attack.width=16 training.epochs=16"
CLEAN_LABEL = "experiment=cifar10_folder_small attack=clean_label attack.surrogate.epochs=6"
ADAPTIVE = {0: "as published", 1: "also trained without bounds"}  # by attack.unbounded_weight
SHOWN = {"none": ("no defense", NEUTRAL, "s:"), "mmac": ("MMAC", BEFORE, "o-"), "mmdf": ("MMDF", AFTER, "^--")}


def difference(images: Tensor, changed: Tensor) -> tuple[Tensor, str]:
    """What changed of the images (N, C, H, W), made visible, and a title that says how."""
    found = (changed - images).abs()
    factor = amplification(float(found.max()))
    return (found * factor).clamp(0, 1), f"|difference| x {factor:g}"


def rows_of(columns: dict[str, Tensor], title: str) -> Figure:
    """One row an image, one column a kind; values are images (N, C, H, W)."""
    num_images = len(next(iter(columns.values())))
    figure = new_figure(1.55 * len(columns), 1.5 * num_images + 0.5, title)
    for row in range(num_images):
        for column, (name, images) in enumerate(columns.items()):
            axes = figure.add_subplot(num_images, len(columns), row * len(columns) + column + 1)
            show(axes, images[row], name if row == 0 else "")
    return figure


@torch.no_grad()
def input_aware(runs_dir: str) -> Figure:
    """Images, each with its own trigger and with that of the image before."""
    setup, spec = obtained(INPUT_AWARE, runs_dir)
    attack = setup.attack
    assert isinstance(attack, InputAware)
    labels = setup.splits.train.labels
    index = torch.stack([(labels == label).nonzero()[0, 0] for label in (1, 4, 8)])
    images = AttackerAccess(spec, setup, obtain_victim).training_images(index)
    own, cross = attack(images), attack.cross_triggered(images)
    change, title = difference(images, own)
    return rows_of(
        {
            "clean": images,
            "triggered": own,
            title: change,
            "mask": attack.mask(images).expand_as(images),
            "another's trigger": cross,
        },
        "Input-aware: every image has its own trigger",
    )


def clean_label(runs_dir: str) -> Figure:
    """Images of the target class, made hard to recognise, and with the patch."""
    spec = specified(CLEAN_LABEL, runs_dir)
    setup = build_setup(spec)
    attack = setup.attack
    assert isinstance(attack, CleanLabel)
    labels = setup.splits.train.labels
    index = attack.poisoned_mask(labels).nonzero().flatten()[:3]
    access = AttackerAccess(spec, setup, obtain_victim)
    images, surrogate = access.training_images(index), access.robust_surrogate(attack.surrogate)
    generator = torch.Generator().manual_seed(0)
    hard = pgd(
        surrogate, images, labels[index], eps=attack.eps, steps=attack.steps, step_size=attack.step_size, generator=generator
    )
    change, title = difference(images, hard)
    return rows_of(
        {"clean": images, "made hard": hard, title: change, "with the patch": attack(hard)},
        "Clean-label: what the victim is trained on",
    )


def adaptive(records: list[RunRecord]) -> Figure:
    """What each defense leaves of the attack, over beta."""
    figure = new_figure(7.2, 3.0, "")
    for place, (weight, title) in enumerate(ADAPTIVE.items()):
        found = {
            float(record.setting("attack.beta") or 0): record
            for record in records
            if (record.status, record.choice("attack"), record.choice("defense")) == ("done", "adaptive", "mmdf")
            and (record.choice("dataset"), record.setting("defense.detector.statistic") or "drop") == ("mnist_m", "drop")
            and (record.setting("attack.unbounded_weight") or 0) == weight
        }
        if not found:
            raise SystemExit(f"no finished runs with attack.unbounded_weight={weight}: see the commands above")
        betas = sorted(found)
        axes = figure.add_subplot(1, 2, place + 1)
        for name, (label, colour, line) in SHOWN.items():
            left = [100 * (found[beta].metrics[name]["asr"] or 0) for beta in betas]
            axes.plot(range(len(betas)), left, line, color=colour, label=label)
        accuracies = [100 * (found[beta].metrics["none"]["acc"] or 0) for beta in betas]
        axes.set_xticks(
            range(len(betas)), [f"{beta:g}\nACC {acc:.0f}" for beta, acc in zip(betas, accuracies, strict=True)], fontsize=9
        )
        axes.set_ylim(-4, 104)
        tidy(axes, title=title, xlabel="beta, and accuracy of the attacker's model", ylabel="ASR, %" if place == 0 else "")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    parser.add_argument("--only", default="", help="pictures whose name contains this")
    given = parser.parse_args()
    pictures = {
        "adaptive": lambda: adaptive(load_records(Path(given.runs_dir))),
        "input_aware": lambda: input_aware(given.runs_dir),
        "clean_label": lambda: clean_label(given.runs_dir),
    }
    for name, draw in pictures.items():
        if given.only in name:
            save_png(draw(), given.output / f"attack_{name}.png")


if __name__ == "__main__":
    main()
