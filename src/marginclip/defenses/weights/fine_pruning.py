"""Fine-pruning (Liu, Dolan-Gavitt and Garg, RAID 2018): switch off the channels that clean images leave idle, then fine-tune."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from marginclip.defenses.base import Variant
from marginclip.defenses.cross_fitting import stratified_share
from marginclip.defenses.weights.finetune import FineTune
from marginclip.defenses.weights.held_out import last_within
from marginclip.errors import require
from marginclip.networks.heads import final_linear, linear_inputs


class FinePruning(FineTune):
    """Prunes inputs of the final linear layer, least active first, while a held-out part of the clean set allows it; fine-tunes.

    A channel's activity is the mean size of that input over the clean set. A pruned channel has zero weights and keeps them through the
    fine-tuning on the whole clean set. The network before fine-tuning is the row ``fine_pruning_pruned``.

    Args:
        max_drop: accuracy, as a fraction, that pruning may cost. The first set of channels that breaks it is not taken.
        held_out_share: part of the clean set that this is measured on.
        **settings: those of :class:`FineTune`.
    """

    label = "Fine-Pruning"

    def __init__(self, *, max_drop: float = 0.04, held_out_share: float = 0.2, **settings: Any) -> None:
        super().__init__(**settings)
        require(
            0 <= max_drop <= 1,
            f"defense.max_drop must be a share in [0, 1], got {max_drop:g}; did you mean {max_drop / 100:g}?",
        )
        require(0 < held_out_share <= 0.5, f"defense.held_out_share must be in (0, 0.5], got {held_out_share:g}")
        self.max_drop, self.held_out_share = max_drop, held_out_share

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Prune a copy of the model; all that is random is which images are held out."""
        super().prepare(model, images, labels)
        self.layer, linear = final_linear(
            self.network, images, needed_for="whose inputs fine-pruning prunes", instead="defense=finetune or defense=mmac"
        )
        inputs = linear_inputs(self.network, linear, images)
        held_out = stratified_share(labels.cpu(), self.held_out_share, self.seed)
        self.activity = inputs.abs().mean(0)
        order = self.activity.argsort(stable=True)
        self.curve = pruning_curve(linear, inputs[held_out], labels[held_out.to(labels.device)].cpu(), order)
        self.num_pruned = last_within(self.curve, self.max_drop)
        kept = torch.ones(len(order), dtype=torch.bool)
        kept[order[: self.num_pruned]] = False
        self.register_buffer("kept", kept, persistent=False)
        with torch.no_grad():
            linear.weight[:, ~kept.to(linear.weight.device)] = 0
        self.pruned = [copy.deepcopy(self.network).eval()]  # in a list: it is no part of what is learned

    def on_after_backward(self) -> None:
        """Without a gradient there is no velocity, and weight decay leaves a zero at zero."""
        weight = self.network.get_submodule(self.layer).weight
        assert isinstance(weight, Tensor) and weight.grad is not None
        weight.grad[:, ~self.kept] = 0  # type: ignore[operator]

    def variants(self) -> dict[str, Variant]:
        return {"fine_pruning_pruned": Variant("Fine-Pruning, pruned only", self.pruned[0])}

    def findings(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "channels": len(self.activity),
            "pruned": self.num_pruned,
            "held_out_accuracy": float(self.curve[0]),
            "held_out_accuracy_pruned": float(self.curve[self.num_pruned]),
        }

    def arrays(self) -> dict[str, Tensor]:
        return {"fine_pruning/activity": self.activity, "fine_pruning/held_out_accuracy": self.curve}


@torch.no_grad()
def pruning_curve(linear: nn.Linear, inputs: Tensor, labels: Tensor, order: Tensor) -> Tensor:
    """Accuracy (in_features + 1,) on inputs (N, in_features) and labels (N,) with the first 0, 1, ... channels of ``order`` off."""
    weight = linear.weight.cpu().float()
    logits = inputs @ weight.T + (0 if linear.bias is None else linear.bias.cpu().float())
    accuracies = [(logits.argmax(1) == labels).float().mean()]
    for channel in order.tolist():
        logits = logits - inputs[:, channel : channel + 1] * weight[:, channel]
        accuracies.append((logits.argmax(1) == labels).float().mean())
    return torch.stack(accuracies)
