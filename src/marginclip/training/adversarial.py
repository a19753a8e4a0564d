"""Single-step adversarial training: what makes the clean-label attack's robust surrogate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.training.poisoned import PoisonedTraining


class AdversarialTraining(PoisonedTraining):
    """:class:`PoisonedTraining` on images moved within ``eps`` by one signed gradient step of 1.25 ``eps`` from a random start.

    Fast adversarial training (Wong, Rice and Kolter, ICLR 2020). The random starts follow from ``seed`` and the batch alone.

    Args:
        model: what is trained, itself and no copy: images (B, C, H, W) to logits (B, K).
        eps: how far a pixel of an image in [0, 1] may be moved at most.
        **settings: ``attack`` of :class:`PoisonedTraining`, and those of :class:`~marginclip.training.ClassifierTraining`:
            ``optimizer``, ``scheduler``, ``label_smoothing``, ``loss`` and ``seed``.

    Raises:
        UserError: as :class:`~marginclip.training.ClassifierTraining`.
    """

    def __init__(self, model: nn.Module, *, eps: float, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.eps = eps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch | {"images": self.moved(batch["images"], batch["labels"], self.draw)}, batch_idx)

    def moved(self, images: Tensor, labels: Tensor, draw: int) -> Tensor:
        """Adversarial copies of images (B, C, H, W) in [0, 1], from the random starts of ``draw``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        shift = (torch.rand(images.shape, generator=generator) * 2 - 1).to(images) * self.eps
        start = (images + shift).clamp(0, 1).requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(self.model(start), labels), start)
        shift = (shift + 1.25 * self.eps * gradient.sign()).clamp(-self.eps, self.eps)
        return (images + shift).clamp(0, 1).detach()
