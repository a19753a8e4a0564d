"""The classifier's head: finding the linear layer whose output is the logits, what enters it, and putting another in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from marginclip.errors import UserError
from marginclip.networks.logits import clean_logits


@torch.no_grad()
def final_linear(network: nn.Module, images: Tensor, *, needed_for: str, instead: str) -> tuple[str, nn.Linear]:
    """The name of the ``nn.Linear`` whose output is the network's logits on ``images`` (N, C, H, W), and that layer.

    A subclass with a forward of its own, such as a cosine classifier, is none: its weights mean something else. Raises
    :class:`UserError` where there is no such layer; ``needed_for`` and ``instead`` end its sentence.
    """
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output.detach().cpu().float()

        return hook

    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    plain = {name: layer for name, layer in layers.items() if type(layer).forward is nn.Linear.forward}
    handles = [layer.register_forward_hook(note(name)) for name, layer in plain.items()]
    try:
        logits = clean_logits(network, images[:2]).cpu()
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, output in outputs.items() if output.shape == logits.shape and torch.equal(output, logits)]
    if not found:
        raise UserError(
            f"the logits of {type(network).__name__} do not come from an nn.Linear layer, {needed_for}; use {instead}"
        )
    return found[-1], plain[found[-1]]


@torch.no_grad()
def linear_inputs(network: nn.Module, linear: nn.Linear, images: Tensor) -> Tensor:
    """What enters ``linear`` (N, in_features) on images, in evaluation mode, on the CPU."""
    inputs: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach().float().cpu()))
    try:
        clean_logits(network, images)
    finally:
        handle.remove()
    return torch.cat(inputs)


@torch.no_grad()
def new_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of the kind and on the device of ``linear`` with copies of ``weight`` (K, F) and ``bias`` (K,); nothing is drawn.

    Where ``linear`` has a bias and ``bias`` is None the new one's is zero, so that its weights have the same names.
    """
    new: nn.Linear = nn.utils.skip_init(
        nn.Linear, linear.in_features, linear.out_features, bias=linear.bias is not None, device=linear.weight.device
    )
    new.weight.copy_(weight)
    if linear.bias is not None:
        new.bias.copy_(torch.zeros_like(linear.bias) if bias is None else bias)
    return new.requires_grad_(True)


def with_head(network: nn.Module, name: str, head: nn.Module) -> nn.Module:
    """``network`` itself with ``head`` in the place of its layer ``name``; ``head`` where the network is nothing but that layer."""
    if not name:
        return head
    network.set_submodule(name, head)
    return network
