"""MMAC: bounds against backdoors (paper 1, Eq. 3 and Algorithm 1)."""

from __future__ import annotations

from marginclip.defenses.clipping.bound_learning import BoundLearning


class MMAC(BoundLearning):
    """Maximum-margin activation clipping: :class:`BoundLearning` with its own defaults, which are the schedule ``tight_start``.

    Bounds start tight, at 0.4 of the 0.9 quantile of the clean activations, where a model has lost accuracy and most attacks have, too.
    The cross entropy of the clean images buys the accuracy back, while a hinge keeps down the margins of clean images that were moved
    towards other classes by a few small steps. Its arguments are those of :class:`BoundLearning`, and so are their defaults.

    Examples:
        >>> MMAC(steps=120).steps
        120
        >>> MMAC(steps=0)
        Traceback (most recent call last):
        marginclip.errors.UserError: defense.steps must be at least 1, got 0
    """

    label = "MMAC"
