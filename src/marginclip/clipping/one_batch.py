"""A model and its bounded network as one batch: behind the first bound that can cut something, weights are read once for both."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from marginclip.clipping.bounded_network import BoundedNetwork
from marginclip.clipping.bounds import Bound
from marginclip.clipping.serving import PairedNetwork, bound_at, can_cut, is_relu, module_of


class Twice(nn.Module):
    """A batch (N, ...) once for the model and once for the bounded network: (2 N, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x])


class ClipSecondHalf(nn.Module):
    """What a bound gives, for the bounded network's half of (2 N, ...) alone; with ``relu``, that of a ReLU before it, too."""

    upper: Tensor
    lower: Tensor

    def __init__(self, bound: Bound, *, relu: bool) -> None:
        super().__init__()
        upper = bound.upper.detach().view(bound.view)
        lower = torch.full_like(upper, float("-inf")) if bound.lower is None else bound.lower.detach().view(bound.view)
        free = torch.full_like(upper, float("inf"))
        both = torch.cat([-free, lower])
        self.register_buffer("upper", torch.cat([free, upper]))
        self.register_buffer("lower", both.clamp(min=0) if relu else both)

    def forward(self, x: Tensor) -> Tensor:
        halves = x.unflatten(0, (2, -1))
        return torch.clamp(halves, self.lower.to(x.dtype).unsqueeze(1), self.upper.to(x.dtype).unsqueeze(1)).flatten(0, 1)


class OneBatchPair(nn.Module):
    """Images (N, C, H, W) to the logits (N, K) of a model and of its bounded network, as :class:`PairedNetwork` but for rounding.

    Faster for few images, where reading the weights takes most of the time. :func:`in_one_batch` makes one.
    """

    def __init__(self, bounded: BoundedNetwork) -> None:
        super().__init__()
        self.network = _graph_module(bounded.fused().network)
        self.offsets = copy.deepcopy(bounded.offsets)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, bounded_logits = self.network(images).unflatten(0, (2, -1))
        return logits, bounded_logits if self.offsets is None else self.offsets(bounded_logits)


def in_one_batch(bounded: BoundedNetwork, images: Tensor) -> OneBatchPair | None:
    """A bounded network and its model in one batch, with batch norms folded; None where that does not give the same logits.

    Args:
        bounded: infinite bounds would make it the model.
        images: (N, C, H, W) in [0, 1], as many as it will be called with. Both ways are tried on them: a network that takes
            numbers from the size of its batch can behave otherwise.
    """
    with torch.inference_mode(False), torch.no_grad():
        wanted = PairedNetwork(bounded, folded=True).to(images.device)(images)
        try:
            pair = OneBatchPair(bounded).to(images.device)
            found = pair(images)
        except (RuntimeError, TypeError, ValueError):
            return None
    alike = all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)
        for one, other in zip(found, wanted, strict=True)
    )
    return pair if alike else None


def _graph_module(network: nn.Module) -> fx.GraphModule:
    """Images to the logits (2 N, K): nodes in front of the first cut are copied to ``once``, what needs both networks to ``twice``."""
    assert isinstance(network, fx.GraphModule)
    root, graph = copy.deepcopy(network), fx.Graph()
    root.add_submodule("twice", Twice())
    once: dict[fx.Node, fx.Node] = {}
    twice: dict[fx.Node, fx.Node] = {}

    def doubled(node: fx.Node) -> fx.Node:
        if node not in twice:
            twice[node] = graph.call_module("twice", (once[node],))
        return twice[node]

    for node in network.graph.nodes:
        bound = bound_at(network, node)
        if node.op == "output":
            graph.output(doubled(node.args[0]))
        elif bound is not None and can_cut(bound):
            (source,) = node.all_input_nodes
            joined = bound.lower is None and is_relu(network, source)
            name = f"{node.target}_of_second"
            root.add_submodule(name, ClipSecondHalf(bound, relu=joined))
            twice[node] = graph.call_module(name, (doubled(source.all_input_nodes[0] if joined else source),))
        elif bound is not None:
            (source,) = node.all_input_nodes
            for copies in (once, twice):
                if source in copies:
                    copies[node] = copies[source]
        elif any(source not in once for source in node.all_input_nodes):
            twice[node] = graph.node_copy(node, doubled)
        else:
            once[node] = graph.node_copy(node, lambda source: once[source])
    return module_of(root, graph)
