"""Repairing a model from Python, without any configuration."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from marginclip.defenses import MMAC, MMBM, MMOM, Auto, Defense
from marginclip.errors import nearest, require
from marginclip.networks.logits import warn_if_poor
from marginclip.networks.tracing import check_traceable
from marginclip.precision import precision_for
from marginclip.silence import silent_trainer

METHODS: dict[str, Any] = {"mmac": MMAC, "mmom": MMOM, "mmbm": MMBM, "auto": Auto}


def repair(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    method: str | None = None,
    defense: Defense | None = None,
    precision: str = "auto",
) -> nn.Module:
    """Repair a classifier without its training set, from a few clean images.

    ``images`` (N, C, H, W) in [0, 1], about 50 of every class; ``labels`` (N,) int64. ``model`` is any torch network that torch.fx or
    torch.export can trace, takes images in [0, 1] and gives logits; it is not changed. ``method`` is ``mmac`` (backdoors; the default),
    ``mmom`` (imbalance and over-training), ``mmbm``, or ``auto``, which tells from the clean images which of the first two is
    needed, if any. ``defense`` is an object with other settings instead, such as ``MMAC(steps=120)``. ``precision="auto"`` learns in
    bf16 where the device computes in it.

    Returns the repaired network: a :class:`~marginclip.clipping.BoundedNetwork`, or for ``auto`` a plain copy where no fault shows.
    Raises :class:`UserError` for images, labels or models that do not fit.
    """
    require(method is None or defense is None, "give repair() a method or a defense, not both")
    method = method or "mmac"
    require(method in METHODS, f"method must be one of {', '.join(METHODS)}, got '{method}'{nearest(str(method), METHODS)}")
    check_traceable(model)
    warn_if_poor(model, images, labels)
    chosen: Defense = METHODS[method]() if defense is None else defense
    numeric = precision_for(precision)
    return chosen.fit(model, images, labels, make_trainer=lambda epochs: silent_trainer(epochs, precision=numeric)).network
