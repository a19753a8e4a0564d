"""MMOM: bounds against imbalance and over-training (paper 2, Eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from marginclip.defenses.clipping.bound_learning import BoundLearning
from marginclip.defenses.clipping.settings import AscentPlan, BoundStart
from marginclip.maxmargin.lambda_control import LambdaController
from marginclip.maxmargin.objectives import BoundObjective, MMOMObjective


class MMOM(BoundLearning):
    """Maximum-margin overfitting mitigation with our default schedule, ``last_activation``.

    The last activation alone is bounded, and one offset a class and one factor of the logits are learned with its bounds, from all
    clean images at every step. Its arguments are those of :class:`BoundLearning`; defaults of its own: the objective is
    :func:`~marginclip.maxmargin.objectives.mmom`, ``start`` 0.6 of the clean maxima, ``ascent`` anew every 10 steps, lambda 1e-5.

    Examples:
        >>> MMOM().sites, MMOM().lambda_.initial
        ('last', 1e-05)
    """

    label = "MMOM"

    def __init__(
        self,
        *,
        objective: BoundObjective | None = None,
        sites: str | Sequence[str] = "last",
        start: BoundStart | None = None,
        ascent: AscentPlan | None = None,
        lambda_: LambdaController | None = None,
        steps: int = 300,
        extra_steps: int = 0,
        tolerance: float | None = 1e-5,
        batch_size: int = 5000,
        learning_rate: float = 0.05,
        lr_scale: str = "absolute",
        offset_rate: float | None = 0.05,
        scale_rate: float | None = 0.01,
        keep: str = "last",
        project: bool = True,
        check_every: int = 10,
        channel_axis: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            objective=objective or MMOMObjective(), sites=sites, start=start or BoundStart(share=0.6, quantile=1.0),
            ascent=ascent or AscentPlan(refresh_every=10, rule="sign", step_size=0.004, max_inputs=None),
            lambda_=lambda_ or LambdaController(initial=1e-5, control="fixed", factor=1.2, min_agreement=0.0, first_check=1),
            steps=steps, extra_steps=extra_steps, tolerance=tolerance,
            batch_size=batch_size, learning_rate=learning_rate, lr_scale=lr_scale,
            offset_rate=offset_rate, scale_rate=scale_rate, keep=keep, project=project, check_every=check_every,
            channel_axis=channel_axis, seed=seed,
        )  # fmt: skip
