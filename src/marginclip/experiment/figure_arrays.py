"""What the figures of a run are drawn from: images, activation extremes and bounds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork, activation_extremes
from marginclip.data.batches import Subset, load_all
from marginclip.experiment.setup import VictimSetup

NUM_EXAMPLES = 8
ACTIVATION_SAMPLES = 500


def figure_arrays(setup: VictimSetup, repaired: nn.Module | None) -> dict[str, Tensor]:
    """``examples/*`` under an attack, and ``activations/*`` of a bounded network, from evaluation images."""
    held_out = setup.splits.held_out
    index = setup.data.eval_index if len(setup.data.eval_index) else setup.data.clean_index
    arrays: dict[str, Tensor] = {}
    images: dict[str, Tensor] = {}
    if setup.attack is not None:
        eligible = index[setup.attack.x2x.eligible(held_out.labels[index])]
        sources = _spread(eligible, ACTIVATION_SAMPLES)
        clean = load_all(Subset(held_out.images, sources))
        images["triggered"] = setup.attack.cpu()(clean)
        picked = _spread(torch.arange(len(clean)), NUM_EXAMPLES)
        labels = held_out.labels[sources][picked]
        arrays |= {"examples/clean": clean[picked], "examples/triggered": images["triggered"][picked]}
        arrays |= {"examples/labels": labels, "examples/targets": setup.attack.x2x.flipped(labels)}
    if isinstance(repaired, BoundedNetwork):
        images["clean"] = load_all(Subset(held_out.images, _spread(index, ACTIVATION_SAMPLES)))
        arrays |= _activations(repaired, images)
    return arrays


def _spread(index: Tensor, count: int) -> Tensor:
    """At most ``count`` entries of ``index`` (N,), evenly spaced."""
    return index[torch.linspace(0, len(index) - 1, min(count, len(index))).long()]


def _activations(repaired: BoundedNetwork, images: dict[str, Tensor]) -> dict[str, Tensor]:
    arrays: dict[str, Tensor] = {}
    for kind, batch in images.items():
        for name, (lowest, highest) in activation_extremes(repaired, batch).items():
            arrays[f"activations/{name}/{kind}_min"] = lowest.amin(0)
            arrays[f"activations/{name}/{kind}_max"] = highest.amax(0)
    for name, bound in repaired.each():
        arrays[f"activations/{name}/upper"] = bound.upper.detach()
        if bound.lower is not None:
            arrays[f"activations/{name}/lower"] = bound.lower.detach()
    return arrays
