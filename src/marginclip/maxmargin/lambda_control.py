"""The controller of lambda, the weight of the margin term."""

from __future__ import annotations

from typing import Any

from marginclip.errors import require

CONTROLS = ("fixed", "agreement")


class LambdaController:
    """Keeps lambda, and moves it by the repaired network's accuracy on the clean samples that the model classified correctly.

    With ``control="agreement"`` a check multiplies lambda by ``factor`` when the accuracy is at least ``min_agreement`` (pi),
    and divides it otherwise (Algorithm 1, lines 11-14). On *correctly classified* samples the model itself scores 1, so
    pi = 0.95 bounds what the repair may lose. On all samples a model of 91 % would never reach it, and lambda would only
    shrink.

    Args:
        initial: lambda at first, from 0 up.
        control: ``agreement`` moves lambda; with ``fixed`` it stays, and ``factor``, ``first_check``, ``smallest`` and
            ``largest`` have no effect.
        factor: what a check multiplies lambda by, or divides it by, above 1.
        min_agreement: pi, the accuracy from which on lambda grows, in [0, 1]. ``keep`` of
            :class:`~marginclip.defenses.BoundLearning` goes by it, too.
        first_check: which check, counted from 1, is the first that moves lambda.
        smallest: no check takes lambda below it; in [0, ``largest``].
        largest: no check takes lambda above it.

    Raises:
        UserError: for a setting outside its range.

    Examples:
        >>> controller = LambdaController(initial=0.1, factor=2.0, min_agreement=0.95, first_check=1)
        >>> [controller.update(agreement) for agreement in (0.99, 0.97, 0.90)]
        [0.2, 0.4, 0.2]
    """

    def __init__(
        self,
        *,
        initial: float = 0.3,
        control: str = "agreement",
        factor: float = 1.5,
        min_agreement: float = 0.98,
        first_check: int = 7,
        smallest: float = 1e-5,
        largest: float = 50.0,
    ) -> None:
        require(initial >= 0, f"defense.lambda_.initial (lambda) must not be negative, got {initial:g}")
        require(control in CONTROLS, f"defense.lambda_.control must be one of {', '.join(CONTROLS)}, got '{control}'")
        require(factor > 1, f"defense.lambda_.factor must be greater than 1, got {factor:g}")
        require(0 <= min_agreement <= 1, f"defense.lambda_.min_agreement (pi) must be in [0, 1], got {min_agreement:g}")
        require(0 <= smallest <= largest, f"defense.lambda_.smallest must be in [0, largest={largest:g}], got {smallest:g}")
        self.initial, self.control, self.factor, self.min_agreement = initial, control, factor, min_agreement
        self.first_check, self.smallest, self.largest = first_check, smallest, largest
        self.reset()

    def reset(self) -> None:
        """Be as new."""
        self.value, self.checks = self.initial, 0

    def update(self, agreement: float) -> float:
        """Take the accuracy of one check, a fraction, and return lambda for the steps that follow."""
        self.checks += 1
        if self.control == "agreement" and self.checks >= self.first_check:
            moved = self.value * self.factor if agreement >= self.min_agreement else self.value / self.factor
            self.value = min(max(moved, self.smallest), self.largest)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted run needs to go on."""
        return {"value": self.value, "checks": self.checks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.value, self.checks = float(state["value"]), int(state["checks"])
