"""The defender's clean set: a small balanced sample of the held-out split; all the rest of that split is for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from marginclip.errors import UserError, require


def split_clean(
    labels: Tensor, classes: tuple[str, ...], *, per_class: int | None, seed: int, order: str = "seeded", reserve: int = 0
) -> tuple[Tensor, Tensor]:
    """Indices of the clean set and of the evaluation set, disjoint, each in data-set order.

    Args:
        labels: of the held-out split, (N,) int64 in [0, K).
        classes: the names of the K classes.
        per_class: images of every class for the clean set. None: all images; the evaluation set is empty then.
        seed: of the random choice; without effect where ``order`` is ``first``.
        order: ``first`` takes the first images of each class, as the published scripts do, ``seeded`` a random choice.
        reserve: so many images of every class, the first in that order, are never evaluated on, also where the clean set is
            smaller. So defenses with clean sets of different sizes are evaluated on the same images.

    Returns:
        Indices of the clean set (M,) and of the evaluation set (E,), int64.

    Raises:
        UserError: for a class that has no image or fewer than asked for, and for other settings outside their range.
    """
    require(order in ("seeded", "first"), f"clean_order must be 'seeded' or 'first', got '{order}'")
    require(per_class is None or per_class >= 1, f"clean_per_class must be at least 1, got {per_class}")
    require(reserve >= 0, f"reserve_per_class must not be negative, got {reserve}")
    generator = torch.Generator().manual_seed(seed + 15485863)
    clean, reserved = (torch.zeros(len(labels), dtype=torch.bool) for _ in range(2))
    for label, name in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        if len(members) == 0:
            raise UserError(f"class '{name}' has no clean images")
        if per_class is not None and per_class > len(members):
            raise UserError(
                f"clean_per_class={per_class} is more than class '{name}' has: {len(members)} held-out images "
                "(clean_per_class=null takes all)"
            )
        if order == "seeded":
            members = members[torch.randperm(len(members), generator=generator)]
        clean[members[:per_class]] = True
        reserved[members[:reserve]] = True
    return clean.nonzero().flatten(), (~clean & ~reserved).nonzero().flatten()


def automatic_sizes(labels: Tensor, wanted: int, *, reserve: int = 500) -> tuple[int, int]:
    """Images a class of the clean set and of the reserve for a held-out split with these ``labels`` (N,).

    Half of the smallest class is left for evaluation: the reserve is ``reserve`` (the most that a method of the papers takes)
    or that half, and the clean set ``wanted`` or the reserve.
    """
    half = max(1, int(labels.bincount().min()) // 2)
    return min(wanted, reserve, half), min(reserve, half)
