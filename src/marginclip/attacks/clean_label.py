"""The clean-label attack: only images of the target class are poisoned, and their labels are right (Turner et al. 2019)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.attacks.base import TrainingAccess
from marginclip.attacks.patch import BadNet
from marginclip.attacks.x2x import X2X
from marginclip.errors import require

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surrogate:
    """How the robust surrogate is trained: the victim's architecture, single-step adversarial training.

    Args:
        epochs: passes over the training set.
        eps: largest change of a pixel (L-infinity).
        seed: of the training. It is not the victim's, so that all victims share one surrogate.
    """

    epochs: int = 12
    eps: float = 8 / 255
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"attack.surrogate.epochs must be at least 1, got {self.epochs}")
        require(0 < self.eps < 1, f"attack.surrogate.eps must be in (0, 1), got {self.eps:g}")


class CleanLabel(BadNet):
    """Poisons images of the target class alone, under their true label. Works with all2one only.

    A share of the target class is made hard to recognise by untargeted PGD against a robust surrogate, then gets the patch of
    :class:`BadNet`. No label changes. At test the patch alone is put on images of the other classes.

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        rate: share of the target class that is poisoned.
        eps: largest change of a pixel by PGD (L-infinity).
        steps: steps of PGD.
        step_size: length of a step.
        surrogate: how the surrogate is trained. None: its defaults.
        seed: of everything that is drawn.
        **settings: those of :class:`BadNet`.
    """

    def __init__(
        self,
        x2x: X2X,
        image_shape: Sequence[int],
        *,
        rate: float = 0.5,
        eps: float = 16 / 255,
        steps: int = 20,
        step_size: float = 2 / 255,
        surrogate: Surrogate | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        require(
            x2x.target is not None and not x2x.one_source,
            f"attack=clean_label needs x2x=all2one: it changes no label, so all its images are of one target class; got x2x={x2x.name}",
        )
        super().__init__(x2x, image_shape, rate=rate, seed=seed, **settings)
        require(0 < eps < 1, f"attack.eps must be in (0, 1), got {eps:g}")
        require(steps >= 1, f"attack.steps must be at least 1, got {steps}")
        require(step_size > 0, f"attack.step_size must be positive, got {step_size:g}")
        self.eps, self.steps, self.step_size, self.surrogate = eps, steps, step_size, surrogate or Surrogate()

    def poisoned_mask(self, labels: Tensor) -> Tensor:
        """``round(rate * count)``, at least one, of the target class's training images."""
        return self.target_mask(labels)

    def prepare(self, access: TrainingAccess) -> None:
        """Train the surrogate, or find it, and replace the images to poison by adversarial ones."""
        labels = access.training_labels()
        index = self.poisoned_mask(labels).nonzero().flatten()
        surrogate = access.robust_surrogate(self.surrogate)
        images = access.training_images(index).to(next(surrogate.parameters()).device)
        generator = torch.Generator().manual_seed(self.seed + 15487469)
        settings = {"eps": self.eps, "steps": self.steps, "step_size": self.step_size}
        hard = pgd(surrogate, images, labels[index], generator=generator, **settings)  # type: ignore[arg-type]
        before, after = (_accuracy(surrogate, each, labels[index]) for each in (images, hard))
        log.info("the surrogate recognises %.1f %% of the images to poison, %.1f %% once made hard", 100 * before, 100 * after)
        if after > 0.2:
            log.warning(
                "over a fifth of the images to poison are still recognised: a larger attack.eps makes the attack stronger"
            )
        access.replace_training_images(index, hard)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    batch_size: int = 250,
) -> Tensor:
    """Images (N, C, H, W) in [0, 1] within ``eps`` of the given ones in every pixel that raise the cross entropy of ``labels``.

    Projected gradient ascent from a random start in the ball (Madry et al. 2018): ``steps`` signed steps of ``step_size``.
    """
    hard = []
    for batch, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        start = (torch.rand(batch.shape, generator=generator) * 2 - 1).to(batch) * eps
        moved = (batch + start).clamp(0, 1)
        for _ in range(steps):
            moved.requires_grad_(True)
            loss = F.cross_entropy(model(moved).float(), wanted.to(moved.device), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + step_size * gradient.sign()
            moved = torch.minimum(torch.maximum(moved, batch - eps), batch + eps).clamp(0, 1)
        hard.append(moved.detach())
    return torch.cat(hard)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    decisions = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return float((decisions == labels.to(decisions.device)).float().mean())
