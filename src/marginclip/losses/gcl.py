"""Gaussian clouded logits (Li et al., CVPR 2022): noise that lowers the logits of rare classes in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.devices import send
from marginclip.errors import require
from marginclip.losses.base import Loss, Network, SecondStage
from marginclip.losses.cosine import with_cosine_head
from marginclip.losses.mixup import mixup


def tail_ranks(class_counts: Tensor) -> Tensor:
    """``(ln n_max - ln n_j) / (ln n_max - ln n_min)`` of the images of every class (K,): 0 for the largest, 1 for the smallest.

    All zero for classes of equal size, where the published code divides zero by zero.
    """
    logarithms = class_counts.double().log()
    spread = logarithms.max() - logarithms.min()
    if float(spread) == 0:
        return torch.zeros(len(class_counts))
    return ((logarithms.max() - logarithms) / spread).float()


def cloud_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """``|e|`` of ``shape`` (B, K), in [0, 1], a draw for every image *and* class; e has the deviation 1/3 and is clamped to [-1, 1].

    Its mean is 0.266.
    """
    return (torch.randn(*shape, generator=generator) / 3).clamp(-1, 1).abs()


def gcl_logits(
    logits: Tensor, labels: Tensor, ranks: Tensor, noise: Tensor, *, scale: float, noise_mul: float, margin: float
) -> Tensor:
    """Logits (B, K) lowered by ``scale * (noise_mul * noise * ranks + margin * [class is the label])``; none is ever raised.

    ``logits`` are scaled cosines, so this is ``scale`` times the published cosines. ``labels`` (B,), ``ranks`` (K,) of
    :func:`tail_ranks`, ``noise`` (B, K) of :func:`cloud_noise`.
    """
    own = F.one_hot(labels, logits.shape[1])
    return logits - scale * (noise_mul * noise * ranks + margin * own)


def focal_cross_entropy(logits: Tensor, labels: Tensor, *, focal: float) -> Tensor:
    """The mean of ``(1 - p)^focal * CE``, p the label's probability, taken as a constant (Lin et al. 2017); 0 is the plain CE."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-losses).exp().detach()) ** focal * losses).mean()


class GCL(Loss):
    """Cross entropy of a cosine classifier's clouded logits (:func:`gcl_logits`), with mixup and a focal factor.

    With mixup each of the two labels has its own noise, as published. Outside of training nothing is clouded.

    Args:
        scale: of the cosine classifier, which :meth:`adapt` puts in the place of the model's last layer.
        noise_mul: weight of the noise, in cosines.
        margin: what is taken from the label's cosine.
        focal: exponent of :func:`focal_cross_entropy`.
        mixup_alpha: of the mixtures; 0 mixes nothing.
        second_stage: as in :class:`Loss`.

    Raises:
        UserError: for a scale that is not positive and for other settings under 0.
    """

    cosine = True

    def __init__(
        self,
        *,
        scale: float = 30.0,
        noise_mul: float = 0.5,
        margin: float = 0.0,
        focal: float = 0.0,
        mixup_alpha: float = 1.0,
        second_stage: SecondStage | None = None,
    ) -> None:
        super().__init__(second_stage=second_stage)
        require(0 < scale < float("inf"), f"loss=gcl: scale must be positive, got {scale:g}")
        others = {"noise_mul": noise_mul, "margin": margin, "focal": focal, "mixup_alpha": mixup_alpha}
        for name, value in others.items():
            require(0 <= value < float("inf"), f"loss=gcl: {name} must be a number from 0 up, got {value:g}")
        self.scale, self.noise_mul, self.margin = scale, noise_mul, margin
        self.focal, self.mixup_alpha = focal, mixup_alpha
        self.ranks: Tensor | None = None

    def adapt(self, model: nn.Module, class_counts: Tensor) -> nn.Module:
        """A copy of ``model`` with a cosine classifier of this loss's scale."""
        require(int(class_counts.min()) >= 1, "loss=gcl needs a training image of every class")
        self.ranks = tail_ranks(class_counts)
        return self.head(model, len(class_counts))

    def head(self, model: nn.Module, num_classes: int) -> nn.Module:
        """A copy of ``model`` with a cosine classifier of this loss's scale."""
        return with_cosine_head(model, num_classes, scale=self.scale)

    def __call__(self, model: Network, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        if self.mixup_alpha == 0:
            return self.of_logits(model(images), labels, generator)
        mixed, others, share = mixup(images, labels, alpha=self.mixup_alpha, generator=generator)
        logits = model(mixed)
        own = self.of_logits(logits, labels, generator)
        return share * own + (1 - share) * self.of_logits(logits, others, generator)

    def of_logits(self, logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of scaled cosines (B, K) for labels (B,)."""
        assert self.ranks is not None, "the loss is adapted to a model before it is used"
        noise, self.ranks = send(cloud_noise(logits.shape, generator), logits.device), send(self.ranks, logits.device)
        clouded = gcl_logits(
            logits.float(), labels, self.ranks, noise,
            scale=self.scale, noise_mul=self.noise_mul, margin=self.margin,
        )  # fmt: skip
        return focal_cross_entropy(clouded, labels, focal=self.focal)
