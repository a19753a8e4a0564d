"""What MMAC costs on clean images that it did not learn from: by where bounds start, data term, pi, and how often bounds are learned.

    python benchmarks/accuracy_cost.py experiment=cifar10_folder_small attack=badnet trainer.threads=1

Bounds are learned from the defender's clean set, and judged on the reserve: held-out images that are neither learned from nor evaluated
on. Nothing here knows a trigger. *Loss* is the accuracy of the model less that of the bounded network. *Kept* is the share of rightly
decided images that stay right. *Margin* is the mean of the ten largest margins, in logits, that the ascent of the default schedule finds
from the reserve under the bounds. *Relaxed* is the control: bounds learned once, moved by a share of the way to the clean maxima. The
victim is found in the store or trained; arguments are options of ``marginclip defend``, and ``--tight-start``: all
rows have the start of ``defense/schedule=tight_start``.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from attacked_model import attacked_model
from torch import Tensor, nn
from torch.utils.data import Subset

from marginclip.clipping import BoundedNetwork
from marginclip.data.batches import load_all
from marginclip.defenses import MMAC
from marginclip.defenses.clipping.feasibility import Relaxation
from marginclip.defenses.clipping.settings import AscentPlan, BoundStart
from marginclip.experiment.setup import VictimSetup
from marginclip.experiment.trainers import build_trainer
from marginclip.maxmargin import LambdaController, MMACObjective
from marginclip.maxmargin.margin import ascend_margins, margin
from marginclip.networks.logits import batched_logits
from marginclip.silence import SILENT, silence_lightning


class Variant(NamedTuple):
    """One change of the default: where bounds start, by what they keep or at which share of which quantile, data term, pi, repeats."""

    kept: float = 0.95
    share: float | None = None
    quantile: float = 1.0
    data: str = "cross_entropy"
    pi: float = 0.98
    repeats: int = 1

    def method(self, seed: int) -> MMAC:
        start = BoundStart(share=self.share, quantile=self.quantile, kept=self.kept)
        objective, lambda_ = MMACObjective(data=self.data), LambdaController(min_agreement=self.pi)
        return MMAC(start=start, objective=objective, lambda_=lambda_, repeats=self.repeats, seed=seed)

    def cells(self) -> tuple[Any, ...]:
        start = f"{self.share:g} of the" if self.share is not None else f"{100 * self.kept:g} % kept,"
        return f"{start} {'maximum' if self.quantile == 1 else f'{self.quantile:g} quantile'}", self.data, self.pi, self.repeats


TIGHT = Variant(share=0.4, quantile=0.9)  # the schedule tight_start
STARTS: tuple[dict[str, Any], ...] = (
    {"share": 0.4, "quantile": 0.9}, {"share": 0.5}, {"kept": 0.8}, {"kept": 0.9}, {"kept": 0.98}, {"quantile": 0.9},
)  # fmt: skip
CHANGES: tuple[dict[str, Any], ...] = (
    {"pi": 0.99}, {"data": "distillation"}, {"data": "kl_divergence", "pi": 0.97}, {"data": "kl_divergence"},
    {"repeats": 2}, {"repeats": 4}, {"data": "distillation", "repeats": 2},
)  # fmt: skip
RELAXED = (0.05, 0.1, 0.2)  # of the way to the clean maxima, after the default
STARTS_PER_CLASS, LARGEST = 50, 10


def reserve(setup: VictimSetup) -> tuple[Tensor, Tensor]:
    """Held-out images (N, C, H, W) that are in neither the clean set nor the evaluation set, and their labels (N,)."""
    held_out, data = setup.splits.held_out, setup.data
    unused = torch.ones(len(held_out), dtype=torch.bool)
    unused[data.clean_index] = unused[data.eval_index] = False
    rows = unused.nonzero().flatten()
    if len(rows) == 0:
        sys.exit("error: all held-out images are in the clean set or evaluated on; set reserve_per_class")
    return load_all(Subset(held_out.images, rows)), held_out.labels[rows]


def largest_margin(network: nn.Module, images: Tensor, labels: Tensor, classes: int) -> float:
    """The mean of the largest margins that are found from images (N, C, H, W) with these labels (N,)."""
    plan = AscentPlan(starts_per_class=STARTS_PER_CLASS, max_inputs=None)
    wanted = plan.classes(classes)
    starts = plan.starts(images, labels, wanted, torch.Generator().manual_seed(5))
    found = []
    for part, towards in zip(starts.split(100), wanted.split(100), strict=True):
        moved = ascend_margins(network, towards, part, **plan.search(first=True)).images
        found.append(margin(network(moved).float(), towards).detach())
    return float(torch.cat(found).topk(LARGEST).values.mean())


def main() -> None:
    silence_lightning()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    tight = "--tight-start" in sys.argv
    given = TIGHT if tight else Variant()
    changes = ({}, *(() if tight else STARTS), *CHANGES)
    spec, setup = attacked_model([argument for argument in sys.argv[1:] if argument != "--tight-start"])
    model, learned_from, (images, labels) = setup.model.eval(), setup.data.clean_set(), reserve(setup)

    def make_trainer(epochs: int) -> Any:
        return build_trainer(spec.trainer, max_epochs=epochs, **SILENT)

    right = batched_logits(model, images).argmax(1) == labels
    print(
        f"{len(images)} images that bounds were not learned from; the model is right about {100 * float(right.float().mean()):.1f} %"
    )
    print(
        "| start | data term | pi | repeats | relaxed | steps | loss | kept % | margin |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )

    def row(network: nn.Module, *named: Any) -> None:
        kept = batched_logits(network, images).argmax(1) == labels
        loss = 100 * float(right.float().mean() - kept.float().mean())
        largest = largest_margin(network, images[right], labels[right], len(setup.classes))
        cells = (*named, f"{loss:.1f}", f"{100 * float(kept[right].float().mean()):.1f}", f"{largest:.2f}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    for variant in (given._replace(**change) for change in changes):
        method = variant.method(spec.seed)
        bounded = method.fit(model, *learned_from, make_trainer=make_trainer).network
        found = method.findings()
        taken = [each["bound_steps"] for each in (found, *found.get("other_repeats", ()))]
        row(bounded, *variant.cells(), "", ", ".join(map(str, taken)))
        if variant == given:
            assert isinstance(bounded, BoundedNetwork)
            way = Relaxation(bounded, learned_from[0])
            for share in RELAXED:
                way.go(share)
                row(bounded, *variant.cells(), f"{100 * share:.0f} %", taken[0])


if __name__ == "__main__":
    main()
