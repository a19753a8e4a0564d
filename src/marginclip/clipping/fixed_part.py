"""What of a bounded network does not depend on its bounds, computed once for a fixed set of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from marginclip.clipping.bounded_network import BoundedNetwork
from marginclip.clipping.bounds import Bound
from marginclip.networks.memory import images_at_once

MAX_BYTES = 512 * 2**20


class FixedPartCache:
    """Logits of a fixed set of images under the bounds of the moment, without the layers in front of the first bound.

    ``images`` (N, C, H, W) are run once, ``batch_size`` at a time, through what comes before any bound; only the values that
    the rest of the network reads are kept. Gradients reach the bounds as usual. Worth its memory where bounds are late in
    the network: see :func:`caching_pays`. The bounds, offsets and whether they are switched on may change between calls; the network's
    weights, the images and the precision (autocast) may not.
    """

    def __init__(self, bounded: BoundedNetwork, images: Tensor, *, batch_size: int | None = None) -> None:
        assert isinstance(bounded.network, fx.GraphModule)
        self.bounded = bounded
        self.fixed, frontier = _split(bounded.network)
        with torch.no_grad():
            parts = [_values(bounded.network, frontier, chunk) for chunk in images.split(batch_size or images_at_once(images))]
        self.kept = {node: torch.cat([part[node] for part in parts]) for node in frontier}

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits (B, K) of the images of these rows, int64 (B,), as the network itself gives them."""
        known: dict[fx.Node, Tensor | None] = dict.fromkeys(self.fixed)
        known |= {node: value[rows] for node, value in self.kept.items()}  # copies: the network may write into them
        assert isinstance(self.bounded.network, fx.GraphModule)
        logits: Tensor = fx.Interpreter(self.bounded.network, garbage_collect_values=False).run(initial_env=known)
        return logits if self.bounded.offsets is None else self.bounded.offsets(logits)


@torch.no_grad()
def caching_pays(bounded: BoundedNetwork, image: Tensor, count: int) -> bool:
    """Whether a :class:`FixedPartCache` of ``count`` images saves at least half of the network and needs at most 512 MiB.

    ``image`` (1, C, H, W) is one of the images. False where the network in front of the bounds gives something else than tensors of
    the images, such as their number.
    """
    if not isinstance(bounded.network, fx.GraphModule):
        return False
    fixed, frontier = _split(bounded.network)
    if 2 * len(fixed) < len(bounded.network.graph.nodes):
        return False
    values = list(_values(bounded.network, frontier, image).values())
    if not all(isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1 for value in values):
        return False
    return count * sum(value.numel() * value.element_size() for value in values) <= MAX_BYTES


def _values(network: fx.GraphModule, wanted: list[fx.Node], images: Tensor) -> dict[fx.Node, Tensor]:
    """The values of some nodes for a batch of images."""
    noting = _Noting(network, wanted)
    noting.run(images)
    return noting.values


class _Noting(fx.Interpreter):
    """Runs a network and keeps the values of some of its nodes."""

    def __init__(self, network: fx.GraphModule, wanted: list[fx.Node]) -> None:
        super().__init__(network)
        self.wanted, self.values = set(wanted), dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def _split(network: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that depend on no bound, and those of them whose values others read and that are values of the images."""
    bound: set[fx.Node] = set()
    for node in network.graph.nodes:
        if _is_bound(network, node) or any(source in bound for source in node.all_input_nodes):
            bound.add(node)
    images: set[fx.Node] = set()
    for node in network.graph.nodes:
        if node.op == "placeholder" or any(source in images for source in node.all_input_nodes):
            images.add(node)
    fixed = [node for node in network.graph.nodes if node not in bound and node in images]
    return fixed, [node for node in fixed if any(user in bound for user in node.users)]


def _is_bound(network: fx.GraphModule, node: fx.Node) -> bool:
    module: nn.Module | None = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, Bound)
