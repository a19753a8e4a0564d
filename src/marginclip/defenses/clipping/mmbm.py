"""MMBM: small bounds by themselves, without margins (Wang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from marginclip.defenses.clipping.bound_learning import BoundLearning
from marginclip.defenses.clipping.settings import AscentPlan, BoundStart
from marginclip.maxmargin.lambda_control import LambdaController
from marginclip.maxmargin.objectives import BoundObjective, MMBMObjective


class MMBM(BoundLearning):
    """Maximum-margin bound minimisation, behind the stem and the first stages only, and without margins.

    Its arguments are those of :class:`BoundLearning`; defaults of its own: every bound starts at 8, lambda at 0.1 (published script: 0.5)
    and moves by the agreement on the clean set. A check is 10 passes over 500 images, so that lambda moves after 20, 30 and 40 of the 50
    passes.

    Examples:
        >>> MMBM().sites, MMBM().objective.ascends
        ('first_half', False)
    """

    label = "MMBM"

    def __init__(
        self,
        *,
        objective: BoundObjective | None = None,
        sites: str | Sequence[str] = "first_half",
        start: BoundStart | None = None,
        ascent: AscentPlan | None = None,
        lambda_: LambdaController | None = None,
        steps: int = 150,
        extra_steps: int = 0,
        tolerance: float | None = None,
        batch_size: int = 200,
        learning_rate: float = 0.1,
        lr_scale: str = "absolute",
        offset_rate: float | None = None,
        scale_rate: float | None = None,
        keep: str = "last",
        project: bool = False,
        check_every: int = 30,
        channel_axis: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            objective=objective or MMBMObjective(), sites=sites, start=start or BoundStart(constant=8.0, share=1.0, quantile=1.0),
            ascent=ascent, lambda_=lambda_ or LambdaController(initial=0.1, factor=1.2, min_agreement=0.95, first_check=2),
            steps=steps, extra_steps=extra_steps,
            tolerance=tolerance, batch_size=batch_size, learning_rate=learning_rate, lr_scale=lr_scale, offset_rate=offset_rate,
            scale_rate=scale_rate, keep=keep, project=project, check_every=check_every, channel_axis=channel_axis, seed=seed,
        )  # fmt: skip
