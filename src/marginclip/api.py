"""Repairing a model from Python, without any configuration."""

from __future__ import annotations

import logging
from typing import Any, Literal

import lightning as L
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses import MMAC, MMBM, MMOM, Auto, Defense
from marginclip.defenses.clipping.tolerance import check_tolerance, hold, keeps_bounds, tell
from marginclip.defenses.cross_fitting import check_folds, cross_fitted
from marginclip.errors import nearest, require
from marginclip.networks.logits import class_numbers, clean_logits, warn_if_poor
from marginclip.networks.tracing import check_traceable
from marginclip.precision import precision_for
from marginclip.silence import on_gpu_of, silent_trainer

log = logging.getLogger(__name__)
FOLDS = 2  # repairs of a part of the images, which tell what a repair costs on others
METHODS: dict[str, Any] = {"mmac": MMAC, "mmom": MMOM, "mmbm": MMBM, "auto": Auto}


def repair(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    method: str | None = None,
    defense: Defense | None = None,
    precision: str = "auto",
    tolerance: float | Literal["auto"] | None = "auto",
) -> nn.Module:
    """Repair a classifier without its training set, from a few clean images.

    Args:
        model: any torch network that torch.fx or torch.export can trace, takes images in [0, 1] and gives logits; it is not changed.
        images: clean images (N, C, H, W) in [0, 1], about 50 of every class, which the model was not trained on.
        labels: their classes (N,), whole numbers.
        method: ``mmac`` (backdoors), ``mmom`` (imbalance and over-training), ``mmbm``, or ``auto``, which tells from the clean
            images which of the first two is needed, if any. None: ``mmac``.
        defense: an object with other settings instead of ``method``, such as ``MMAC(steps=120)``.
        precision: ``auto`` learns in bf16 where the device computes in it; else ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        tolerance: points of accuracy that the repair may cost on images that it has not seen. Two further repairs, each of half of
            the images, measure that; where it costs more, the bounds are relaxed until it does not, and a warning says so, or that
            it cannot be held. None leaves this out, and takes a third of the time. A number is refused with methods without bounds,
            with ``method="auto"``, which weighs the cost itself, and with methods that keep their last bounds whatever they cost
            (``mmom``, ``mmbm``, the published schedules). ``auto`` is None for those and 1 for the others.

    Returns:
        The repaired network: a :class:`~marginclip.clipping.BoundedNetwork`, or for ``auto`` a plain copy where no fault shows.

    Raises:
        UserError: for images, labels or models that do not fit, for both a ``method`` and a ``defense``, and for a ``tolerance`` that
            the method does not hold.
    """
    require(method is None or defense is None, "give repair() a method or a defense, not both")
    method = method or "mmac"
    require(method in METHODS, f"method must be one of {', '.join(METHODS)}, got '{method}'{nearest(str(method), METHODS)}")
    chosen: Defense = METHODS[method]() if defense is None else defense
    relaxed = chosen.bounds_activations is not False and not isinstance(chosen, Auto) and not keeps_bounds(chosen)
    points = (1.0 if relaxed else None) if tolerance == "auto" else tolerance
    check_tolerance(points)
    require(
        points is None or relaxed,
        f"{chosen.label} does not relax bounds, so that tolerance={points} has no effect: leave it out",
    )
    check_traceable(model)
    labels = class_numbers(labels)
    warn_if_poor(model, images, labels)
    if points is not None:
        check_folds(labels, FOLDS)
    numeric = precision_for(precision)

    def make_trainer(epochs: int) -> L.Trainer:
        return silent_trainer(epochs, precision=numeric, **on_gpu_of(model))

    network = chosen.fit(model, images, labels, make_trainer=make_trainer).network
    if points is None:
        return network
    if not isinstance(network, BoundedNetwork):
        if tolerance != "auto":
            log.warning("%s set no bounds: nothing holds its cost to tolerance=%g", chosen.label, points)
        return network
    fitted = cross_fitted(chosen, model, images, labels, folds=FOLDS, make_trainer=make_trainer)
    cost = hold(network, fitted, images, labels, clean_logits(model, images), tolerance=points)
    tell(cost, points)
    return network
