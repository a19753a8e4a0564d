"""Holding a repair to a tolerance in points of accuracy, on images that it has not seen."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses.base import Defense
from marginclip.defenses.clipping.feasibility import SHARES, Relaxation
from marginclip.defenses.cross_fitting import CrossFitted
from marginclip.errors import require

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """What a repair costs on images that it has not seen: the accuracy ``before`` and ``after`` in [0, 1] and the out-of-fold
    ``logits`` (N, K). ``relaxed`` says how far its bounds were moved towards the clean maxima, in [0, 1]."""

    before: float
    after: float
    relaxed: float
    logits: Tensor

    @property
    def points(self) -> float:
        """Points of accuracy that are lost; negative where some are won."""
        return round(100 * (self.before - self.after), 9)  # so that one image of a hundred is one point


def check_tolerance(tolerance: float | None) -> None:
    """Raise :class:`UserError` unless ``tolerance`` is a number of points from 0 up, or None."""
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    require(
        tolerance is None or (number and tolerance >= 0),
        f"tolerance must be points of accuracy from 0 up, or null, got {tolerance!r}",
    )


def hold(
    network: nn.Module,
    fitted: CrossFitted,
    images: Tensor,
    labels: Tensor,
    logits: Tensor,
    *,
    tolerance: float | None,
    keep_bounds: bool = False,
) -> Cost:
    """Relax the bounds of ``network`` in place until it costs at most ``tolerance`` points on images that it has not seen.

    ``fitted`` are repairs like it that each left a part of the clean ``images`` (N, C, H, W) with ``labels`` (N,) out, ``logits`` (N, K)
    those of the model. All move towards the clean maxima by the same share, one of ``SHARES``; the first that holds is taken. Where
    none does, the learned bounds stay. So they do with ``keep_bounds``, with a ``tolerance`` of None, and in a network without bounds.
    """
    labels = labels.cpu()
    before = _accuracy(logits, labels)

    def cost(relaxed: float) -> Cost:
        found = fitted.logits(images)
        return Cost(before, _accuracy(found, labels), relaxed, found)

    learned = cost(0.0)
    ways = [] if keep_bounds or tolerance is None or learned.points <= tolerance else _ways(fitted, images)
    for share in SHARES if ways else ():
        for way in ways:
            way.go(share)
        found = cost(share)
        if tolerance is not None and found.points <= tolerance and isinstance(network, BoundedNetwork):
            Relaxation(network, images).go(found.relaxed)
            return found
    for way in ways:
        way.go(0.0)
    return learned


def keeps_bounds(defense: Defense) -> bool:
    """Whether a defense returns its last bounds whatever they cost, as the published schedules do."""
    return getattr(defense, "keep", None) == "last"


def tell(cost: Cost, tolerance: float | None, *, keep_bounds: bool = False) -> None:
    """Log what was done to hold the ``tolerance``, or that it is not held and what to do."""
    if tolerance is None:
        return
    if cost.points > tolerance:
        log.warning(
            "the repair costs %.1f points of accuracy on images that it has not seen, more than tolerance=%g%s. Give more clean images, "
            "set a higher tolerance, or let MMDF decide: it changes flagged images alone",
            cost.points, tolerance,
            ", and defense.keep=last forbids to relax its bounds" if keep_bounds else ", even with bounds at the clean maxima",
        )  # fmt: skip
    elif cost.relaxed:
        log.warning(
            "the bounds were relaxed by %.0f %% of the way to the clean maxima. They cost %.1f points on images that they have not seen "
            "(tolerance=%g), and remove less of a trigger than the learned ones",
            100 * cost.relaxed, cost.points, tolerance,
        )  # fmt: skip


def _ways(fitted: CrossFitted, images: Tensor) -> list[Relaxation]:
    return [
        Relaxation(network, images[~fitted.left_out(number)])
        for number, network in enumerate(fitted.networks)
        if isinstance(network, BoundedNetwork)
    ]


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1).cpu() == labels).double().mean())
