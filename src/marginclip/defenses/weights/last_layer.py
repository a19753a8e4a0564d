"""The last layer alone learned from the clean set, on features of the model as it is (after cRT, Kang et al., ICLR 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from marginclip.defenses.weights.finetune import FineTune
from marginclip.errors import require
from marginclip.networks.copies import own_copy
from marginclip.networks.heads import final_linear, linear_inputs, new_linear, with_head
from marginclip.networks.logits import check_clean_set, clean_logits


class LastLayer(FineTune):
    """Trains the final linear layer on the clean set by cross entropy with SGD; everything before it stays as it is.

    What enters the layer is computed once, in evaluation mode and without augmentation. The rate falls to 0 along a half cosine, as in cRT.

    Args:
        restart: starts from a new layer drawn from ``seed`` (cRT) instead of the model's own.
        epochs: passes over the clean set.
        batch_size: images in a step.
        learning_rate: of SGD, at the start.
        momentum: of SGD.
        weight_decay: of SGD.
        seed: of the order of the images, and of a new layer.

    Raises:
        UserError: for a setting outside its range; by ``fit`` for a model whose logits do not come from a linear layer.
    """

    label = "last layer"
    clean_per_class = 50

    def __init__(
        self,
        *,
        restart: bool = False,
        epochs: int = 50,
        batch_size: int = 128,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> None:
        rates: dict[str, Any] = {"learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(epochs=epochs, batch_size=batch_size, seed=seed, batch_norm="frozen", **rates)
        self.restart = restart

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Compute the features once and copy the layer that is to learn from them."""
        check_clean_set(images, labels, clean_logits(model, images[:2]).shape[1])
        require(len(images) >= 2, f"fine-tuning needs at least 2 clean images, got {len(images)}")
        body = own_copy(model)
        self.layer, linear = final_linear(
            body, images, needed_for="which is what is trained", instead="defense=vector_scaling or defense=finetune"
        )
        head = new_linear(linear, linear.weight, linear.bias)
        if self.restart:
            draw_again(head, self.seed)
        self.body = [body]  # in a list: it is no part of what is learned
        self.learn_from(head, linear_inputs(body, linear, images).to(head.weight.device), labels)

    def rate(self, epoch: int) -> float:
        """A half cosine from ``learning_rate`` to 0."""
        return self.learning_rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def repaired(self) -> nn.Module:
        """The model with the learned layer in the place of its own."""
        device = next(self.body[0].parameters()).device
        return with_head(self.body[0], self.layer, self.network.to(device)).eval()

    def findings(self) -> dict[str, Any]:
        """Which layer was trained, and whether it began anew."""
        return {"layer": self.layer, "restarted": self.restart}


def draw_again(linear: nn.Linear, seed: int) -> None:
    """Initialise ``linear`` anew as PyTorch does, from ``seed`` alone; nobody else draws differently for it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        fresh = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    linear.load_state_dict(fresh.state_dict())
