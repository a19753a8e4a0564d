"""What the detector's cross-fitting costs and is worth: steps of fewer images, steps of full size, or one half alone.

    python benchmarks/fold_cost.py --runs-dir runs --seeds 0,1,2

Each victim is repaired once. Its detector is then fitted three ways, and each is judged on the evaluation images. ``in proportion`` is what
:func:`~marginclip.defenses.cross_fitting.cross_fitted` does: two repairs whose steps take half of the images. ``full steps`` are two
repairs whose steps take as many images as the repair's own. ``one half`` is the first of these alone; its null has half of the images.
Victims that are not in the store are trained first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from clean_sets import Judge
from torch import Tensor, nn
from verdicts import obtained

from marginclip.defenses import MMAC
from marginclip.defenses.cross_fitting import cross_fitted_logits, stratified_folds
from marginclip.maxmargin import MarginDropDetector
from marginclip.networks.logits import batched_logits, clean_logits
from marginclip.silence import silence_lightning

Null = tuple[Tensor, Tensor]  # logits of the model and of repairs that never saw the image


def in_proportion(model: nn.Module, images: Tensor, labels: Tensor) -> Null:
    """Two repairs whose steps take half of the images."""
    return clean_logits(model, images).cpu(), cross_fitted_logits(MMAC(), model, images, labels)


def full_steps(model: nn.Module, images: Tensor, labels: Tensor, numbers: tuple[int, ...] = (0, 1)) -> Null:
    """Two repairs whose steps take as many images as the repair's own."""
    fold = stratified_folds(labels, 2, 0)
    halves = [(MMAC().fit(model, images[fold != number], labels[fold != number]).network, fold == number) for number in numbers]
    both = [(clean_logits(model, images[out]).cpu(), clean_logits(network, images[out]).cpu()) for network, out in halves]
    return torch.cat([given for given, _ in both]), torch.cat([bounded for _, bounded in both])


def one_half(model: nn.Module, images: Tensor, labels: Tensor) -> Null:
    """One such repair; the other half of the images is the null."""
    return full_steps(model, images, labels, (0,))


WAYS: dict[str, Callable[[nn.Module, Tensor, Tensor], Null]] = {
    "in proportion": in_proportion,
    "full steps": full_steps,
    "one half": one_half,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--victim", default="attack=badnet", help="options of the victims")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--clean-per-class", type=int, default=50)
    given = parser.parse_args()
    silence_lightning()
    print("| victim | folds | MMAC | MMDF | MMDF, repair decides | false alarms, % | TPR, % | s | times the repair |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in given.seeds.split(","):
        setup, _ = obtained(f"{given.victim} seed={seed}", given.runs_dir, clean_per_class=given.clean_per_class)
        model, (images, labels), judge = setup.model, setup.data.clean_set(), Judge(setup)
        started = time.process_time()
        network = MMAC().fit(model, images, labels).network
        repair = time.process_time() - started
        triggered = [batched_logits(each, judge.triggered) for each in (model, network)]
        for name, way in WAYS.items():
            started = time.process_time()
            detector = MarginDropDetector.from_logits(model, network, *way(model, images, labels))
            seconds = time.process_time() - started
            _, *rows, alarms = judge.rows(detector)
            flagged = 100 * float(detector.decide(*triggered).flagged.float().mean())
            print(
                f"| {given.victim} seed={seed} | {name} | {' | '.join(rows)} | {alarms} | {flagged:.1f} | {seconds:.0f} | "
                f"{seconds / repair:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
