"""Bounds that a runtime can join to the layers before them: scales move into the neighbouring layers, and a clip to [0, 1] is left."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn

from marginclip.clipping.serving import Clip, is_relu
from marginclip.networks.layout import contiguous_input

SMALLEST = 1e-12  # an upper bound below this one is taken for zero


class ClipToOne(nn.Module):
    """Values to [0, 1], the same for all channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, 0.0, 1.0)


def scale_bounds(network: fx.GraphModule) -> int:
    """Write ``min(relu(x), upper)`` as ``upper * clip(x / upper, 0, 1)``, in place; returns for how many bounds.

    The same function but for rounding. onnxruntime joins a clip between two numbers to the convolution before it, and no minimum with a
    number for each channel. The scales become a part of the convolutions on either side where nothing else sees the values, and elsewhere
    1 x 1 convolutions of one channel each. Left alone are bounds behind anything but a ReLU, of other than feature maps (N, C, H, W),
    and with an infinite or a negative number.

    Args:
        network: with a :class:`~marginclip.clipping.serving.Clip` for each bound; nobody else may use its weights, which change.
    """
    own = _own_convolutions(network)
    nodes = [node for node in network.graph.nodes if _can_be_scaled(network, node)]
    for node in nodes:
        _scale(network, node, own)
    network.delete_all_unused_submodules()
    network.graph.lint()
    network.recompile()
    return len(nodes)


def _can_be_scaled(network: fx.GraphModule, node: fx.Node) -> bool:
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, Clip) or module.lower is not None:
        return False
    (source,) = node.all_input_nodes
    upper, maps = module.upper, module.upper.ndim == 4 and module.upper.shape[1] == module.upper.numel()
    return maps and bool(upper.isfinite().all()) and float(upper.min()) >= 0 and is_relu(network, source)


def _own_convolutions(network: fx.GraphModule) -> dict[fx.Node, nn.Conv2d]:
    """Convolutions that are called once, with weights of their own that nothing computes at each call."""
    called = [node for node in network.graph.nodes if node.op == "call_module"]
    found = {node: network.get_submodule(str(node.target)) for node in called}
    uses = Counter(id(parameter) for module in found.values() for parameter in module.parameters())
    return {
        node: module
        for node, module in found.items()
        if type(module) is nn.Conv2d
        and "weight" in module._parameters
        and all(hook is contiguous_input for hook in module._forward_pre_hooks.values())
        and all(uses[id(parameter)] == 1 for parameter in module.parameters())
    }


def _scale(network: fx.GraphModule, node: fx.Node, own: dict[fx.Node, nn.Conv2d]) -> None:
    (relu,) = node.all_input_nodes
    upper = network.get_submodule(str(node.target)).get_buffer("upper").flatten()
    inverse = torch.where(upper > SMALLEST, 1 / upper, 0)
    before = relu.all_input_nodes[0]
    if before in own and len(before.users) == 1 and len(relu.users) == 1:
        _scale_outputs(own[before], inverse)
        scaled = before  # clipping to [0, 1] does what the ReLU did
    else:
        scaled = _insert(network, node, f"{node.target}_down", _channelwise(inverse), relu)
    clipped = _insert(network, node, f"{node.target}_clip", ClipToOne(), scaled)
    for user in [user for user in node.users if user in own]:
        _scale_inputs(own[user], upper)
        user.replace_input_with(node, clipped)
    if node.users:
        node.replace_all_uses_with(_insert(network, node, f"{node.target}_up", _channelwise(upper), clipped))
    network.graph.erase_node(node)
    if not relu.users:
        network.graph.erase_node(relu)


def _insert(network: fx.GraphModule, place: fx.Node, name: str, module: nn.Module, source: fx.Node) -> fx.Node:
    network.add_submodule(name, module)
    with network.graph.inserting_before(place):
        return network.graph.call_module(name, (source,))


@torch.no_grad()
def _scale_outputs(layer: nn.Conv2d, scale: Tensor) -> None:
    layer.weight.mul_(scale.view(-1, 1, 1, 1))
    if layer.bias is not None:
        layer.bias.mul_(scale)


@torch.no_grad()
def _scale_inputs(layer: nn.Conv2d, scale: Tensor) -> None:
    by_group = layer.weight.unflatten(0, (layer.groups, -1))  # (groups, outputs, inputs, height, width)
    by_group.mul_(scale.view(layer.groups, 1, -1, 1, 1))


@torch.no_grad()
def _channelwise(scale: Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(len(scale), len(scale), 1, groups=len(scale), bias=False)
    layer.weight.copy_(scale.view(-1, 1, 1, 1))
    return layer.requires_grad_(False)
