"""States of a bounded network around its learning: where bounds and offsets start, and how far learned bounds must give way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from marginclip.clipping import BoundedNetwork
from marginclip.clipping.bounds import LogitOffsets
from marginclip.defenses.posthoc.affine_logits import fit_affine
from marginclip.errors import require
from marginclip.networks.logits import clean_logits

OFFSET_L2 = 1e-6
ACCEPTED = 0.95  # pi of the papers: less than what is asked for, and better than bounds that let the trigger in again
LESS_ACCURATE = (
    "no bounds classified %.3g %% of the clean images right in %d steps: those that classified %.1f %% right, the most, were kept. Allow "
    "more steps (defense.extra_steps) for more accuracy"
)
RELAXED = (
    "no bounds classified %.3g %% of the clean images right in %d steps, so the bounds were relaxed by %.0f %% of the way to the clean "
    "maxima, and a backdoor may be left. Label the images by hand if the model itself did it, or allow more steps (defense.extra_steps)"
)
# Of the way to the clean maxima. Fine at first: a tenth of it can bring a trigger back, where less is as accurate as asked for.
SHARES = (*(step / 50 for step in range(1, 10)), *(tenth / 10 for tenth in range(2, 11)))


def start_offsets(offsets: LogitOffsets, logits: Tensor, labels: Tensor) -> None:
    """Set ``offsets``, and their scale where they have one, to what fits best with ``logits`` (N, K) to ``labels`` (N,).

    ``logits`` are those under the bounds that learning starts from. Raises :class:`UserError` where no positive scale fits.
    """
    kind = "none" if offsets.scale is None else "shared"
    scale, shift = fit_affine(logits, labels, scale=kind, shift=True, l2=OFFSET_L2, advice="set defense.scale_rate=null")
    require(
        float(scale.min()) > 0,
        f"the best temperature on the clean set is not positive (1 / {float(scale.min()):.3g}): the model's logits say nothing about "
        "the labels; set defense.scale_rate=null, or use defense=last_layer",
    )
    offsets.load({"offsets": shift, "scale": scale})


HALVINGS = 8  # of the interval (0, 1] in which the share is looked for


@torch.no_grad()
def fit_share(bounded: BoundedNetwork, images: Tensor, labels: Tensor, kept: float) -> float:
    """Multiply all bounds by the smallest share at which they keep ``kept``, in (0, 1], of what the model has right.

    That is of the clean ``images`` (N, C, H, W) that the model classifies as their ``labels`` (N,). Before, the bounds are those of share
    1, the clean maxima. The share is found by halving an interval eight times, to within 1 / 256, as if a larger one kept no less. It is
    returned.

    Raises :class:`UserError` where the model has no image right.
    """
    with bounded.unbounded():
        right = clean_logits(bounded, images).argmax(1).cpu() == labels.cpu()
    require(
        bool(right.any()),
        f"the model classifies none of the {len(images)} clean images correctly, so no start can be fitted: set "
        "defense.start.share; are the labels right?",
    )
    images, labels = images[right.to(images.device)], labels[right.to(labels.device)].cpu()
    values = [value for _, bound in bounded.each() for value in bound.values()]
    widest = [value.clone() for value in values]

    def set_to(share: float) -> None:
        for value, wide in zip(values, widest, strict=True):
            value.copy_(share * wide)

    lowest, share = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (lowest + share) / 2
        set_to(middle)
        agreement = float((clean_logits(bounded, images).argmax(1).cpu() == labels).double().mean())
        lowest, share = (lowest, middle) if agreement >= kept else (middle, share)
    set_to(share)
    return share


@dataclass
class CheckedBounds:
    """Which of the bounds that were checked may be returned, as of :meth:`BoundedNetwork.bounds_state`.

    Args:
        best: those to return of all that kept the accuracy; empty while none did.
        step: after which they were learned.
        score: their objective at the initial lambda.
        most_accurate: those that kept the most images right, where the learning may fall back on them.
        agreement: the share of images that these kept right, in [0, 1].
    """

    best: dict[str, Tensor] = field(default_factory=dict)
    step: int = -1
    score: float = float("inf")
    most_accurate: dict[str, Tensor] = field(default_factory=dict)
    agreement: float = 0.0


class Relaxation:
    """The way of learned bounds towards the clean maxima of ``images`` (N, C, H, W); bounds beyond those stay where they are."""

    @torch.no_grad()
    def __init__(self, bounded: BoundedNetwork, images: Tensor) -> None:
        self.bounded, self.learned = bounded, bounded.bounds_state()
        bounded.set_from_images(images)
        clean = bounded.bounds_state()
        self.widest = {
            name: (torch.maximum if name.endswith("upper") else torch.minimum)(clean[name], self.learned[name])
            for name in self.learned
        }
        bounded.load_bounds(self.learned)

    @torch.no_grad()
    def go(self, share: float) -> None:
        """Set the bounds at this share of the way, in [0, 1]."""
        self.bounded.load_bounds({name: torch.lerp(value, self.widest[name], share) for name, value in self.learned.items()})


@torch.no_grad()
def relax_until_accurate(bounded: BoundedNetwork, images: Tensor, labels: Tensor, min_agreement: float) -> float:
    """Move learned bounds towards the clean maxima, by the next of ``SHARES``, until ``min_agreement`` of the ``images`` (N, C, H, W)
    are classified as their ``labels`` (N,). At the maxima the bounded network is right wherever the model is. Returns the share of
    the way in [0, 1].
    """
    relaxation = Relaxation(bounded, images)
    for share in (0.0, *SHARES):
        relaxation.go(share)
        agreement = float((clean_logits(bounded, images).argmax(1) == labels).double().mean())
        if agreement >= min_agreement:
            break
    return share
