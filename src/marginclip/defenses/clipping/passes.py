"""How many images a repair sends through the network, counted from its settings before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from marginclip.defenses.base import Defense
from marginclip.defenses.clipping.bound_learning import BoundLearning
from marginclip.defenses.clipping.feasibility import HALVINGS, SHARES
from marginclip.defenses.clipping.mmac import MMAC

RELAXING, STARTING = 1 + len(SHARES), 4  # passes over the clean images that end and begin a repair, at most


@dataclass(frozen=True)
class Passes:
    """Images that pass the network ``forward`` alone, and ``backward`` as well; the largest number that a step takes ``at_once``."""

    forward: float = 0.0
    backward: float = 0.0
    at_once: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward, max(self.at_once, other.at_once))


def passes_of(defense: Defense, count: int, classes: int, *, longest: bool = False) -> Passes | None:
    """The passes of one repair from ``count`` clean images of so many ``classes``; None for a method whose course is not known before.

    Of bound learning, as if no loss came to rest before ``steps``; ``longest``: with all its ``extra_steps``.
    """
    if not isinstance(defense, BoundLearning):
        return None
    plan, steps = defense.ascent, defense.steps + (defense.extra_steps if longest else 0)
    inputs = len(plan.classes(classes)) if defense.objective.ascends else 0
    clean = 0 if defense.sites == "last" else min(defense.batch_size, count)  # what lies before the last activation is kept
    step = clean + min(inputs, plan.batch_size or inputs)
    later = plan.steps + 1
    ascents = inputs * (later * -(-steps // plan.refresh_every) + plan.first_steps - plan.steps)
    checks = -(-steps // defense.check_every) * (inputs + (0 if defense.sites == "last" else count))
    starting = STARTING + (HALVINGS + 1 if defense.start.decided(count // classes).fitted else 0)
    repeats = defense.repeats if isinstance(defense, MMAC) else 1
    return Passes(repeats * (checks + (RELAXING + starting) * count), repeats * (steps * step + ascents), step)


def passes_with_folds(defense: Defense, count: int, classes: int, folds: int, *, longest: bool = False) -> Passes | None:
    """The same of a repair and of ``folds`` further ones that each leave a part of the images out."""
    with defense.in_proportion(1 - 1 / folds if folds else 1.0):
        part = passes_of(defense, count - count // max(1, folds), classes, longest=longest)
    whole = passes_of(defense, count, classes, longest=longest)
    if part is None or whole is None:
        return None
    total = whole
    for _ in range(folds):
        total = total + part
    return total + Passes(forward=RELAXING * count)
