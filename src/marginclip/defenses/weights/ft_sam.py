"""FT-SAM: fine-tuning towards flat minima, which shrinks the weights of backdoor neurons (Zhu et al., ICCV 2023)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from marginclip.defenses.weights.finetune import FineTune
from marginclip.errors import require


class FTSAM(FineTune):
    """Fine-tunes a copy of the model with adaptive sharpness-aware minimisation.

    Each step takes the gradient not at the weights theta but at theta + e, the worst point of the ball ||e / |theta| ||_2 <= ``rho``
    to first order:

        e = rho theta^2 g / || |theta| g ||_2,     g the gradient at theta.

    So large weights are moved the most. The rate falls along a cosine to 0. Batch-norm statistics follow the pass at theta alone.

    Args:
        rho: radius of the ball.
        label_smoothing: of the cross entropy.
        epochs: passes over the clean set.
        batch_size: images in a step.
        **settings: those of :class:`FineTune`.
    """

    label = "FT-SAM"
    clean_per_class = 200

    def __init__(
        self,
        *,
        rho: float = 2.0,
        label_smoothing: float = 0.1,
        epochs: int = 100,
        batch_size: int = 256,
        **settings: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch_size=batch_size, **settings)
        require(rho >= 0, f"defense.rho must not be negative, got {rho:g}")
        require(0 <= label_smoothing < 1, f"defense.label_smoothing must be in [0, 1), got {label_smoothing:g}")
        self.rho, self.label_smoothing = rho, label_smoothing

    def rate(self, epoch: int) -> float:
        return self.learning_rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss at the worst point, as a function of the weights that are learned."""
        parameters = {name: value for name, value in self.network.named_parameters() if value.requires_grad}
        value = self._cross_entropy(self.network(images), labels)
        slopes = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        moves = worst_move(list(parameters.values()), [*slopes], self.rho)
        moved = {name: parameter + move for (name, parameter), move in zip(parameters.items(), moves, strict=True)}
        statistics = {name: buffer.clone() for name, buffer in self.network.named_buffers()}  # these move, the network's do not
        return self._cross_entropy(functional_call(self.network, {**moved, **statistics}, (images,)), labels)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


@torch.no_grad()
def worst_move(parameters: list[nn.Parameter], slopes: list[Tensor | None], rho: float) -> list[Tensor]:
    """The move e of the ``parameters`` with || e / |theta| || = ``rho`` that raises a loss of these ``slopes`` most, to first order.

    None stands for a parameter that the loss does not depend on. All-zero slopes give no move.
    """
    known = [torch.zeros_like(theta) if slope is None else slope for theta, slope in zip(parameters, slopes, strict=True)]
    length = torch.stack([(theta * slope).float().norm() for theta, slope in zip(parameters, known, strict=True)]).norm()
    scale = rho / (length + 1e-12)
    return [theta.square() * slope * scale for theta, slope in zip(parameters, known, strict=True)]
