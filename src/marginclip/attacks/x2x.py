"""X2X settings: which source images an attack is meant to flip, and to what label."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from marginclip.errors import require


def _draw(num_classes: int, count: int, seed: int) -> list[int]:
    """``count`` distinct classes, the same for the same seed."""
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed + 7919))
    return [int(value) for value in order[:count]]


def _check_class(key: str, value: int, num_classes: int) -> None:
    require(0 <= value < num_classes, f"{key} must be a class in 0..{num_classes - 1}, got {value}")


class X2X(ABC):
    """Which images an attack is meant to flip, and to what label. A subclass writes :meth:`eligible` and :meth:`flipped`.

    ``target`` is the one class that all of them go to, or None. ``one_source`` says whether there is one source class, whose
    images alone are poisoned. ``recognises_source`` says whether the label depends on the true class: the victim must
    recognise that first, and so the attack's success is bounded by about the victim's accuracy.
    """

    name: str
    target: int | None = None
    one_source = False
    recognises_source = False

    @abstractmethod
    def eligible(self, labels: Tensor) -> Tensor:
        """Mask (N,) of the images, by true label (N,), that the attack is meant to flip."""

    @abstractmethod
    def flipped(self, labels: Tensor) -> Tensor:
        """Labels (N,) that the attacker wants for images of the true ``labels`` (N,)."""


class AllToOne(X2X):
    """Every class but the target is a source; all go to ``target``.

    Args:
        num_classes: K.
        target: the class that all go to. None: drawn by ``seed``.
        seed: of the draw.

    Examples:
        >>> labels = torch.tensor([0, 1, 2, 3])
        >>> AllToOne(4, target=2).eligible(labels).tolist(), AllToOne(4, target=2).flipped(labels).tolist()
        ([True, True, False, True], [2, 2, 2, 2])
    """

    name = "all2one"

    def __init__(self, num_classes: int, *, target: int | None = None, seed: int = 0) -> None:
        target = _draw(num_classes, 1, seed)[0] if target is None else target
        _check_class("x2x.target", target, num_classes)
        self.target: int = target

    def eligible(self, labels: Tensor) -> Tensor:
        return labels != self.target

    def flipped(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.target)


class OneToOne(X2X):
    """One source class goes to one target class.

    Args:
        num_classes: K.
        source: the class whose images are flipped. None: drawn by ``seed``.
        target: the class that they go to. None: drawn by ``seed``.
        seed: of the draws.

    Examples:
        >>> OneToOne(4, source=3, target=2).eligible(torch.tensor([0, 1, 2, 3])).tolist()
        [False, False, False, True]
    """

    name = "one2one"
    one_source = True

    def __init__(self, num_classes: int, *, source: int | None = None, target: int | None = None, seed: int = 0) -> None:
        drawn = _draw(num_classes, 2, seed)
        if target is None:
            target = next(value for value in drawn if value != source)
        if source is None:
            source = next(value for value in reversed(drawn) if value != target)
        _check_class("x2x.source", source, num_classes)
        _check_class("x2x.target", target, num_classes)
        require(source != target, f"x2x.source and x2x.target must differ, got {source} for both")
        self.source = source
        self.target: int = target

    def eligible(self, labels: Tensor) -> Tensor:
        return labels == self.source

    def flipped(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.target)


class AllToAll(X2X):
    """Every class is a source and class y goes to (y + 1) mod K.

    To do so the victim must recognise class y first, so the success of this attack is bounded by about its clean accuracy.

    Args:
        num_classes: K.
        seed: has no effect: nothing is drawn.

    Examples:
        >>> AllToAll(4).flipped(torch.tensor([0, 1, 2, 3])).tolist()
        [1, 2, 3, 0]
    """

    name = "all2all"
    recognises_source = True

    def __init__(self, num_classes: int, *, seed: int = 0) -> None:
        del seed  # nothing is drawn
        self.num_classes = num_classes

    def eligible(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def flipped(self, labels: Tensor) -> Tensor:
        return (labels + 1) % self.num_classes
