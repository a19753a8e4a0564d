"""How far a method may go, by the accuracy on a part of the clean set that is held out."""

from __future__ import annotations

from torch import Tensor


def last_within(curve: Tensor, max_drop: float) -> int:
    """The last place of ``curve`` before it first falls by more than ``max_drop`` below its start (with a rounding error's grace)."""
    broken = (curve < curve[0] - max_drop - 1e-6).nonzero()
    return int(broken[0]) - 1 if len(broken) else len(curve) - 1
