"""X2X settings: which source images an attack is meant to flip, and to what label."""

from __future__ import annotations

import torch
from torch import Tensor

from marginclip.errors import require


def _draw(num_classes: int, count: int, seed: int) -> list[int]:
    """``count`` distinct classes, the same for the same seed."""
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed + 7919))
    return [int(value) for value in order[:count]]


def _check_class(key: str, value: int, num_classes: int) -> None:
    require(0 <= value < num_classes, f"{key} must be a class in 0..{num_classes - 1}, got {value}")


class AllToOne:
    """Every class but the target is a source; all go to ``target`` (drawn by ``seed`` when None)."""

    name = "all2one"

    def __init__(self, num_classes: int, *, target: int | None = None, seed: int = 0) -> None:
        self.target = _draw(num_classes, 1, seed)[0] if target is None else target
        _check_class("x2x.target", self.target, num_classes)

    def eligible(self, labels: Tensor) -> Tensor:
        """Mask (N,) of the images, by true label (N,), that the attack is meant to flip."""
        return labels != self.target

    def flipped(self, labels: Tensor) -> Tensor:
        """Labels (N,) that the attacker wants for images of the true ``labels`` (N,)."""
        return torch.full_like(labels, self.target)


class OneToOne:
    """One source class goes to one target class (both drawn by ``seed`` when None)."""

    name = "one2one"

    def __init__(self, num_classes: int, *, source: int | None = None, target: int | None = None, seed: int = 0) -> None:
        drawn = _draw(num_classes, 2, seed)
        if target is None:
            target = next(value for value in drawn if value != source)
        if source is None:
            source = next(value for value in reversed(drawn) if value != target)
        _check_class("x2x.source", source, num_classes)
        _check_class("x2x.target", target, num_classes)
        require(source != target, f"x2x.source and x2x.target must differ, got {source} for both")
        self.source, self.target = source, target

    def eligible(self, labels: Tensor) -> Tensor:
        """Mask (N,) of the images, by true label (N,), that the attack is meant to flip."""
        return labels == self.source

    def flipped(self, labels: Tensor) -> Tensor:
        """Labels (N,) that the attacker wants for images of the true ``labels`` (N,)."""
        return torch.full_like(labels, self.target)


class AllToAll:
    """Every class is a source and class y goes to (y + 1) mod K.

    To do so the victim must recognise class y first, so the success of this attack is bounded by about its clean accuracy.
    """

    name = "all2all"

    def __init__(self, num_classes: int, *, seed: int = 0) -> None:
        del seed  # nothing is drawn
        self.num_classes = num_classes

    def eligible(self, labels: Tensor) -> Tensor:
        """Mask (N,) of the images, by true label (N,), that the attack is meant to flip."""
        return torch.ones_like(labels, dtype=torch.bool)

    def flipped(self, labels: Tensor) -> Tensor:
        """Labels (N,) that the attacker wants for images of the true ``labels`` (N,)."""
        return (labels + 1) % self.num_classes


X2X = AllToOne | OneToOne | AllToAll
