"""MMAC: bounds against backdoors (paper 1, Eq. 3 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

from marginclip.defenses.clipping.bound_learning import BoundLearning
from marginclip.defenses.clipping.settings import AscentPlan, BoundStart
from marginclip.maxmargin.lambda_control import LambdaController
from marginclip.maxmargin.objectives import BoundObjective, MMACObjective


class MMAC(BoundLearning):
    """Maximum-margin activation clipping with our default schedule, ``clean_starts``; see :class:`BoundLearning` for the arguments.

    Bounds start at ``share`` 0.5 of the 0.9 quantile of the clean activations. Margin inputs are clean images of other classes, moved by
    a few small steps.
    """

    label = "MMAC"

    def __init__(
        self,
        *,
        objective: BoundObjective | None = None,
        sites: str | Sequence[str] = "all",
        start: BoundStart | None = None,
        ascent: AscentPlan | None = None,
        lambda_: LambdaController | None = None,
        steps: int = 60,
        tolerance: float | None = None,
        batch_size: int = 100,
        learning_rate: float = 0.02,
        lr_scale: str = "absolute",
        offset_rate: float | None = None,
        scale_rate: float | None = None,
        keep: str = "best",
        project: bool = True,
        check_every: int = 10,
        channel_axis: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            objective=objective or MMACObjective(), sites=sites, start=start, ascent=ascent, lambda_=lambda_, steps=steps,
            tolerance=tolerance, batch_size=batch_size, learning_rate=learning_rate, lr_scale=lr_scale, offset_rate=offset_rate,
            scale_rate=scale_rate, keep=keep, project=project, check_every=check_every, channel_axis=channel_axis, seed=seed,
        )  # fmt: skip
