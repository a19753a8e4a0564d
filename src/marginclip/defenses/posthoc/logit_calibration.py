"""Scales and shifts of the logits learned from the clean set: temperature, bias, vector scaling and what lies between."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.defenses.base import ComputedDefense, RepairResult
from marginclip.defenses.posthoc.affine_logits import SCALES, AffineLogits, fit_affine
from marginclip.errors import nearest, require
from marginclip.networks.logits import check_clean_set, clean_logits

LABELS = {
    ("none", True): "bias only",
    ("shared", False): "temperature scaling",
    ("shared", True): "bias-corrected temperature",
    ("per_class", True): "vector scaling",
    ("per_class", False): "LWS",
}


class LogitCalibration(ComputedDefense):
    """Replaces the logits f by ``scale * f + shift``, fitted to the clean set by its mean cross entropy.

    For K classes these are: temperature scaling (``shared``, no shift; 1 parameter), bias only (``none`` and a shift; K), bias-corrected
    temperature (``shared`` and a shift; K + 1), vector scaling (``per_class`` and a shift; 2 K) and learnable weight scaling
    (``per_class``, no shift; K).

    Args:
        scale: ``none``, ``shared`` (one number, the inverse of a temperature) or ``per_class``.
        shift: whether one number is added to each logit.
        l2: pull towards the identity (:func:`fit_affine`). The tiny default only sees to it that there is one best fit where the model is
            right on every clean image.
        seed: has no effect: nothing is drawn.

    Raises:
        UserError: for a setting outside its range; by ``fit`` where the best shared scale is not positive, as it would turn the order
            of the classes round.
    """

    bounds_activations = False

    def __init__(self, *, scale: str = "none", shift: bool = True, l2: float = 1e-6, seed: int = 0) -> None:
        del seed  # nothing is random
        require(
            scale in SCALES, f"defense.scale must be none, shared or per_class, got '{scale}'" + nearest(str(scale), SCALES)
        )
        require(scale != "none" or shift, "defense.scale=none with defense.shift=false leaves nothing to learn")
        require(0 < l2 < float("inf"), f"defense.l2 must be positive, got {l2:g}; 1e-6 is next to nothing")
        self.scale, self.shift, self.l2 = scale, shift, l2

    def compute(self, model: nn.Module, images: Tensor, labels: Tensor) -> RepairResult:
        """Fits scale and shift, and puts them behind a copy of the model."""
        logits = clean_logits(model, images).cpu().double()
        check_clean_set(images, labels, logits.shape[1])
        scale, shift = fit_affine(
            logits, labels, scale=self.scale, shift=self.shift, l2=self.l2, advice=f"raise defense.l2, now {self.l2:g}"
        )
        require(
            self.scale != "shared" or float(scale.min()) > 0,
            f"the best temperature on the clean set is not positive (1 / {float(scale.min()):.3g}): the model's logits say nothing about "
            "the labels; use defense=last_layer",
        )
        before, after = (float(F.cross_entropy(values, labels.cpu())) for values in (logits, logits * scale + shift))
        found: dict[str, Any] = {"clean_nll_before": before, "clean_nll": after}
        if self.scale == "shared":
            found["temperature"] = 1 / float(scale)
        elif self.scale == "per_class":
            found["scale"] = scale.tolist()
        found |= {"shift": shift.tolist()} if self.shift else {}
        return RepairResult(AffineLogits(model, scale=scale, shift=shift), findings=found)

    @property
    def label(self) -> str:  # type: ignore[override]
        """The name of the method that these settings make."""
        return LABELS[self.scale, self.shift]
