"""The images that a detector is surest and most wrong about, small, to be looked at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from marginclip.data.batches import Subset, load_all
from marginclip.experiment.setup import VictimSetup

MOST = 24
LARGEST_SIDE = 48


def extreme_images(setup: VictimSetup, row: str, scores: dict[str, Tensor], flagged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ``MOST`` most extreme images of three groups, as arrays below ``extremes/<row>/<group>/``.

    ``scores`` and ``flagged``, by ``clean`` (N,) and ``triggered`` (M,), are those of the evaluation, in its order. The groups:
    ``caught``, triggered images of the largest statistic; ``missed``, triggered ones that were not flagged, of the smallest;
    ``false_alarms``, flagged clean ones, of the largest. Each has ``images`` uint8 (n, C, h, w), no side longer than
    ``LARGEST_SIDE``, ``statistic`` (n,) in logits and ``labels`` (n,), the true classes; a group without images has nothing.
    """
    held_out = setup.splits.held_out
    index = {"clean": setup.data.eval_index if len(setup.data.eval_index) else setup.data.clean_index}
    groups = {"false_alarms": ("clean", flagged["clean"], True)}
    if setup.attack is not None:
        index["triggered"] = index["clean"][setup.attack.x2x.eligible(held_out.labels[index["clean"]])]
        groups |= {"caught": ("triggered", flagged["triggered"], True), "missed": ("triggered", ~flagged["triggered"], False)}
    arrays: dict[str, Tensor] = {}
    for group, (kind, members, largest) in groups.items():
        chosen = _most_extreme(scores[kind], members, largest=largest)
        if len(chosen):
            images = load_all(Subset(held_out.images, index[kind][chosen]))
            shown = images if setup.attack is None or kind == "clean" else setup.attack.cpu()(images)
            found = {"images": small(shown), "statistic": scores[kind][chosen], "labels": held_out.labels[index[kind][chosen]]}
            arrays |= {f"extremes/{row}/{group}/{key}": values for key, values in found.items()}
    return arrays


def small(images: Tensor) -> Tensor:
    """Images (n, C, H, W) in [0, 1] as uint8, averaged down until no side is longer than ``LARGEST_SIDE``."""
    height, width = images.shape[-2:]
    factor = max(1.0, max(height, width) / LARGEST_SIDE)
    if factor > 1:
        images = adaptive_avg_pool2d(images, (max(1, round(height / factor)), max(1, round(width / factor))))
    return (255 * images).round().byte()


def _most_extreme(scores: Tensor, members: Tensor, *, largest: bool) -> Tensor:
    """The positions of at most ``MOST`` members, the most extreme first."""
    positions = members.nonzero().squeeze(1)
    return positions[torch.argsort(scores[positions], descending=largest, stable=True)[:MOST]]
