"""The last layer of a classifier: finding it, and one whose logits are scaled cosines in its place."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.errors import UserError


class CosineLinear(nn.Module):
    """Logits ``scale * cos(features, class weights)``: (N, in_features) to (N, num_classes), in [-scale, scale], no bias.

    ``scale`` is part of ``state_dict``: whoever loads the model gets logits, never bare cosines.

    Args:
        weight: (num_classes, in_features); it is copied, and its rows are brought to unit length.
        scale: what cosines are multiplied by.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, *, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(weight.detach().clone()))
        self.register_buffer("scale", torch.tensor(float(scale), device=weight.device))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


def final_layer(model: nn.Module) -> str:
    """The name of the last linear or cosine layer of ``model`` ('' for the model itself).

    Raises :class:`UserError` where there is none.
    """
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | CosineLinear)]
    if not names:
        raise UserError(
            f"the model {type(model).__name__} has no nn.Linear as its last layer, and this loss must replace that layer or "
            "train it alone; use loss=cross_entropy or loss=mixup, or another model"
        )
    return names[-1]


def with_cosine_head(model: nn.Module, num_classes: int, *, scale: float) -> nn.Module:
    """A copy of ``model`` whose last layer is a :class:`CosineLinear` of the same directions, with this ``scale``.

    Raises :class:`UserError` where the last linear layer does not give ``num_classes`` logits.
    """
    twin = copy.deepcopy(model)
    name = final_layer(twin)
    last = twin.get_submodule(name)
    weight = last.weight
    assert isinstance(weight, Tensor)
    if len(weight) != num_classes:
        raise UserError(
            f"the last linear layer '{name}' of {type(model).__name__} gives {len(weight)} values, not {num_classes} logits: "
            "the loss cannot put its cosine classifier there; use loss=cross_entropy or loss=mixup, or another model"
        )
    if isinstance(last, CosineLinear):
        last.scale.fill_(scale)
        return twin
    head = CosineLinear(weight, scale=scale)
    if not name:
        return head
    parent, _, child = name.rpartition(".")
    setattr(twin.get_submodule(parent), child, head)
    return twin
