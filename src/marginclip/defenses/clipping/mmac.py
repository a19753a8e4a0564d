"""MMAC: bounds against backdoors (paper 1, Eq. 3 and Algorithm 1)."""

from __future__ import annotations

from marginclip.defenses.clipping.bound_learning import BoundLearning


class MMAC(BoundLearning):
    """Maximum-margin activation clipping: :class:`BoundLearning` with its own defaults, which are the schedule ``clean_starts``.

    Bounds start at half of the 0.9 quantile of the clean activations. Margin inputs are clean images of other classes, moved by a few
    small steps. Arguments are those of :class:`BoundLearning`.
    """

    label = "MMAC"
