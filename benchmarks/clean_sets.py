"""What a repair and its detector are worth where the clean images are uneven, wrongly labelled or not labelled at all.

    python benchmarks/clean_sets.py --runs-dir runs

Each row is :meth:`marginclip.Artefact.fit`, which is what ``marginclip repair`` does, on one victim and one clean set drawn from its 50
images a class. Victims that are not in the store are trained first. Accuracy and success of the attack are those of the evaluation set.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from verdicts import obtained

import marginclip
from marginclip.experiment.setup import VictimSetup
from marginclip.maxmargin import MarginDropDetector
from marginclip.networks.logits import batched_logits
from marginclip.silence import silence_lightning, silent_trainer

VICTIMS = ("attack=badnet", "attack=chessboard", "attack=wanet training.epochs=50")
FEWEST, MOST = 5, 50


def clean_sets(setup: VictimSetup, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of every kind of clean set by its name."""
    images, labels = setup.data.clean_set()
    generator = torch.Generator().manual_seed(seed + 7)
    number = torch.arange(len(setup.classes)) / (len(setup.classes) - 1)
    sizes = (MOST * (FEWEST / MOST) ** number).round().long()[torch.randperm(len(setup.classes), generator=generator)]
    uneven, even = first_of_each(labels, sizes), first_of_each(labels, torch.full_like(sizes, int(sizes.sum()) // len(sizes)))
    decided = batched_logits(setup.model, images).argmax(1)
    return {
        "uneven": (images[uneven], labels[uneven]),  # 50 to 5 a class
        "wrong2": (images, with_wrong_labels(labels, 0.02, len(setup.classes), generator)),
        "unlabelled": (images, decided.to(labels)),  # the model's own decisions
        "wrong10": (images, with_wrong_labels(labels, 0.1, len(setup.classes), generator)),
        "even": (images[even], labels[even]),  # as many as uneven
        "all": (images, labels),
    }


def first_of_each(labels: Tensor, sizes: Tensor) -> Tensor:
    """Rows of the first ``sizes`` (K,) images of every class."""
    return torch.cat([(labels == label).nonzero().flatten()[: int(size)] for label, size in enumerate(sizes)])


def with_wrong_labels(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """The labels (N,) with a random ``share`` of them moved to a random other class."""
    moved = labels.clone()
    rows = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    moved[rows] = (labels[rows] + torch.randint(1, classes, (len(rows),), generator=generator)) % classes
    return moved


class Judge:
    """The evaluation set of a victim, clean and triggered, and what its model decides there."""

    def __init__(self, setup: VictimSetup) -> None:
        held_out, attack = setup.data.splits.held_out, setup.attack
        assert attack is not None
        self.images = held_out.images[setup.data.eval_index].float() / 255
        self.labels = held_out.labels[setup.data.eval_index]
        chosen = attack.x2x.eligible(self.labels)
        self.triggered = attack(self.images[chosen])
        self.targets = attack.x2x.flipped(self.labels[chosen])

    def score(self, decisions: Tensor, triggered: Tensor) -> str:
        """ACC / ASR in percent."""
        accuracy, success = (decisions == self.labels).float().mean(), (triggered == self.targets).float().mean()
        return f"{100 * accuracy:.1f} / {100 * success:.1f}"

    def rows(self, detector: MarginDropDetector) -> list[str]:
        """ACC / ASR of the model, of its repair, of MMDF, of MMDF where the repair decides, and the share of false alarms."""
        logits = [batched_logits(network, self.images) for network in (detector.model, detector.repaired)]
        triggered = [batched_logits(network, self.triggered) for network in (detector.model, detector.repaired)]
        clean = detector.decide(*logits)
        repaired = detector.changed(rule="repaired")
        return [
            self.score(logits[0].argmax(1), triggered[0].argmax(1)),
            self.score(logits[1].argmax(1), triggered[1].argmax(1)),
            self.score(clean.decisions, detector.decide(*triggered).decisions),
            self.score(repaired.decide(*logits).decisions, repaired.decide(*triggered).decisions),
            f"{100 * clean.flagged.float().mean():.1f}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--only", default="", help="victims whose options contain this")
    parser.add_argument("--sets", default="all,uneven,even,wrong2,wrong10,unlabelled", help="the clean sets, of these")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    silence_lightning()
    print("| victim | clean images | no defense | MMAC | MMDF | MMDF, repair decides | false alarms | s |")
    print("|---|---|---|---|---|---|---|---|")
    for options in VICTIMS:
        if given.only not in options:
            continue
        setup, _ = obtained(f"{options} seed={given.seed}", given.runs_dir)
        judge = Judge(setup)
        sets = clean_sets(setup, given.seed)
        for name in given.sets.split(","):
            images, labels = sets[name]
            started = time.perf_counter()
            artefact = marginclip.Artefact.fit(setup.model, images, labels, seed=given.seed, make_trainer=silent_trainer)
            seconds = time.perf_counter() - started
            detector = artefact.detector.changed(statistic="drop")  # the papers'
            print(
                f"| {options} | {name}, {len(images)} images | {' | '.join(judge.rows(detector))} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
