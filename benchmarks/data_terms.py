"""What MMAC costs on clean images that it did not learn from: by data term, pi, and how often bounds are learned.

    python benchmarks/data_terms.py experiment=cifar10_folder_small attack=badnet trainer.threads=1

Bounds are learned from the defender's clean set, and judged on the reserve: held-out images that are neither learned from nor evaluated
on. Nothing here knows a trigger. *Loss* is the accuracy of the model less that of the bounded network. *Kept* is the share of rightly
decided images that stay right. *Margin* is the mean of the ten largest margins, in logits, that the ascent of the default schedule finds
from the reserve under the bounds. *Relaxed* is the control: bounds learned once, moved by a share of the way to the clean maxima. The
victim is found in the store or trained; arguments are options of ``marginclip defend``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from attacked_model import attacked_model
from torch import Tensor, nn
from torch.utils.data import Subset

from marginclip.clipping import BoundedNetwork
from marginclip.data.batches import load_all
from marginclip.defenses import MMAC
from marginclip.defenses.clipping.feasibility import Relaxation
from marginclip.defenses.clipping.settings import AscentPlan
from marginclip.experiment.setup import VictimSetup
from marginclip.experiment.trainers import build_trainer
from marginclip.maxmargin import LambdaController, MMACObjective
from marginclip.maxmargin.margin import ascend_margins, margin
from marginclip.networks.logits import batched_logits
from marginclip.silence import SILENT, silence_lightning

# Data term, pi, how often bounds are learned.
VARIANTS = (
    ("cross_entropy", 0.98, 1), ("cross_entropy", 0.99, 1), ("kl_divergence", 0.97, 1), ("kl_divergence", 0.98, 1),
    ("cross_entropy", 0.98, 2), ("cross_entropy", 0.98, 4), ("distillation", 0.98, 1), ("distillation", 0.98, 2),
)  # fmt: skip
RELAXED = (0.05, 0.1, 0.2)  # of the way to the clean maxima, after the first variant
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
    spec, setup = attacked_model(sys.argv[1:])
    model, learned_from, (images, labels) = setup.model.eval(), setup.data.clean_set(), reserve(setup)

    def make_trainer(epochs: int) -> Any:
        return build_trainer(spec.trainer, max_epochs=epochs, **SILENT)

    right = batched_logits(model, images).argmax(1) == labels
    print(
        f"{len(images)} images that bounds were not learned from; the model is right about {100 * float(right.float().mean()):.1f} %"
    )
    print(
        "| data term | pi | repeats | relaxed | steps | loss | kept % | margin |\n|---|---|---|---|---|---|---|---|", flush=True
    )

    def row(network: nn.Module, *named: Any) -> None:
        kept = batched_logits(network, images).argmax(1) == labels
        loss = 100 * float(right.float().mean() - kept.float().mean())
        largest = largest_margin(network, images[right], labels[right], len(setup.classes))
        cells = (*named, f"{loss:.1f}", f"{100 * float(kept[right].float().mean()):.1f}", f"{largest:.2f}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    for data, pi, repeats in VARIANTS:
        settings = {"objective": MMACObjective(data=data), "lambda_": LambdaController(min_agreement=pi)}
        method = MMAC(repeats=repeats, seed=spec.seed, **settings)
        bounded = method.fit(model, *learned_from, make_trainer=make_trainer).network
        found = method.findings()
        taken = [each["bound_steps"] for each in (found, *found.get("other_repeats", ()))]
        row(bounded, data, pi, repeats, "", ", ".join(map(str, taken)))
        if (data, pi, repeats) == VARIANTS[0]:
            assert isinstance(bounded, BoundedNetwork)
            way = Relaxation(bounded, learned_from[0])
            for share in RELAXED:
                way.go(share)
                row(bounded, data, pi, repeats, f"{100 * share:.0f} %", taken[0])


if __name__ == "__main__":
    main()
