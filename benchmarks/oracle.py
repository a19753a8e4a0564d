"""The best that bounds could do: MMAC beside bounds that are learned with the trigger known, on one victim.

    python benchmarks/oracle.py attack=sinusoid
    python benchmarks/oracle.py experiment=cifar10_folder_small attack=wanet training.epochs=10

The oracle is MMAC whose margin inputs are clean images with the attacker's own trigger. No defender has them. Where the attack survives
the oracle as well, its triggered images do not differ from clean ones in what bounds can cut: no way of learning bounds would help. The
victim is found in the store or trained; arguments are options of ``marginclip defend``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from attacked_model import attacked_model
from torch import Tensor

from marginclip.attacks import Attack
from marginclip.defenses import MMAC, StaticClip
from marginclip.defenses.clipping.settings import BoundStart
from marginclip.evaluation import Evaluation
from marginclip.experiment.trainers import build_trainer
from marginclip.silence import SILENT, silence_lightning


class Oracle(MMAC):
    """MMAC that knows the attack: its margin inputs are triggered clean images, of which each climbs for the class that it is sent to."""

    def __init__(self, attack: Attack, **settings: Any) -> None:
        super().__init__(**settings)
        self.known = [attack]  # in a list: it is no part of what is learned

    def _classes(self, step: int) -> Tensor:
        count = self.ascent.starts_per_class * self.num_classes
        return self.known[0].x2x.flipped(self.labels[self._sources(step, count)].cpu()).to(self.device)

    def _ascend(self, step: int) -> None:
        count = self.ascent.starts_per_class * self.num_classes
        self.margin_inputs = self.known[0](self.images[self._sources(step, count)])

    def _sources(self, step: int, count: int) -> Tensor:
        """Rows of clean images that the attack can flip."""
        possible = self.known[0].x2x.eligible(self.labels.cpu()).nonzero().flatten()
        refresh = step // self.ascent.refresh_every
        order = torch.randperm(len(possible), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + refresh))
        return possible[order[:count]].to(self.device)


def main() -> None:
    silence_lightning()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    spec, setup = attacked_model(sys.argv[1:])
    if setup.attack is None:
        sys.exit("error: attack=none has no trigger that could be known")
    images, labels = setup.data.clean_set()

    def make_trainer(epochs: int) -> Any:
        return build_trainer(spec.trainer, max_epochs=epochs, **SILENT)

    methods = {
        "no defense": None,
        "bounds set at half of the maximum": StaticClip(),
        "bounds set at MMAC's start": StaticClip(start=BoundStart()),
        "MMAC": MMAC(seed=spec.seed),
        "bounds learned with the trigger known": Oracle(setup.attack, seed=spec.seed),
    }
    networks = {
        name: setup.model if method is None else method.fit(setup.model, images, labels, make_trainer=make_trainer).network
        for name, method in methods.items()
    }
    evaluation = Evaluation(networks)
    build_trainer(spec.trainer, **SILENT).test(evaluation, setup.data, verbose=False)
    print("| bounds | ACC % | ASR % |\n|---|---|---|")
    for name, values in evaluation.results().items():
        print(f"| {name} | {100 * values['acc']:.1f} | {100 * values['asr']:.1f} |")


if __name__ == "__main__":
    main()
