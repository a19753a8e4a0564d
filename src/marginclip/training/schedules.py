"""Learning rates over a training: warm-up and drops by epoch, and a cosine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from marginclip.errors import require


class WarmUpAndDrops:
    """Makes schedules of ``epochs`` epochs whose rate rises linearly, epoch by epoch, and later drops to parts of itself.

    The default is that of LDAM-DRW (drops at 160 and 180 of 200 epochs, to 0.01 and 0.0001; Cao et al. 2019).

    Args:
        epochs: length of the training, at least 1.
        warm_up_epochs: how many first epochs the rate rises in. In the e-th of them, from 1, it is ``e / warm_up_epochs`` of
            the optimizer's own. 0: no warm-up.
        milestones: epochs done, in rising order, behind each of which the rate drops; positive. Those under 1 are shares of
            ``epochs``, rounded to whole ones; one that is rounded to ``epochs`` has no effect.
        factors: part of the optimizer's own rate behind each milestone, positive, as many as ``milestones``.

    Raises:
        UserError: for a setting outside its range, for milestones that do not rise or are never reached, and for another number
            of factors.
    """

    def __init__(
        self,
        *,
        epochs: int,
        warm_up_epochs: int = 5,
        milestones: Sequence[float] = (0.8, 0.9),
        factors: Sequence[float] = (0.01, 0.0001),
    ) -> None:
        key = "training.scheduler"
        require(epochs >= 1, f"{key}.epochs must be at least 1, got {epochs}")
        require(warm_up_epochs >= 0, f"{key}.warm_up_epochs must not be negative, got {warm_up_epochs}")
        for name, values in {"milestones": milestones, "factors": factors}.items():
            require(_are_numbers(values), f"{key}.{name} must be a list of numbers, got {values!r}")
        rising = all(one < other for one, other in pairwise(milestones))
        require(
            rising and min(milestones, default=1) > 0, f"{key}.milestones must be positive and rise, got {list(milestones)}"
        )
        whole = all(value < 1 or float(value).is_integer() for value in milestones)
        require(whole, f"{key}.milestones must be shares under 1 or whole epochs, got {list(milestones)}")
        late = [value for value in milestones if value >= max(1, epochs)]
        require(not late, f"{key}.milestones must be under the {epochs} epochs (or shares under 1), got {list(milestones)}")
        require(
            len(factors) == len(milestones) and min(factors, default=1) > 0,
            f"{key}.factors must be {len(milestones)} positive numbers, one a milestone, got {list(factors)}",
        )
        self.epochs, self.warm_up_epochs, self.factors = epochs, warm_up_epochs, tuple(factors)
        self.milestones = tuple(round(value * epochs) if value < 1 else int(value) for value in milestones)

    def factor(self, epoch: int) -> float:
        """The part of the optimizer's rate in an epoch, from 0."""
        if epoch < self.warm_up_epochs:
            return (epoch + 1) / self.warm_up_epochs
        passed = sum(epoch >= milestone for milestone in self.milestones)
        return self.factors[passed - 1] if passed else 1.0

    def __call__(self, optimizer: Optimizer, *, total_steps: int) -> LambdaLR:
        """The schedule of ``total_steps`` steps, stepped after every batch."""
        return LambdaLR(optimizer, lambda step: self.factor(step * self.epochs // total_steps))


def _are_numbers(values: object) -> bool:
    """Whether this is a list of numbers, which a word or one number is not."""
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    return listed and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)  # type: ignore[attr-defined]


def cosine_to_zero(optimizer: Optimizer, *, total_steps: int) -> CosineAnnealingLR:
    """From the optimizer's rate to zero along half a cosine, stepped after every batch.

    Args:
        optimizer: the optimizer whose rate falls.
        total_steps: steps until the rate is zero.

    Returns:
        The schedule.
    """
    return CosineAnnealingLR(optimizer, T_max=total_steps)
