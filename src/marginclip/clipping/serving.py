"""A bounded network as it is served: bounds cost no pass of their own, and what it has in common with its model is computed once."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from marginclip.clipping.bounded_network import BoundedNetwork
from marginclip.clipping.bounds import Bound
from marginclip.networks.exporting import aten_name, out_of_place
from marginclip.networks.tracing import called

RELUS = (F.relu, torch.relu, "relu")
OUT_OF_PLACE = {
    operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub, operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv, operator.ipow: operator.pow, operator.imod: operator.mod,
}  # fmt: skip
# What gives another view of a tensor's values, or may: writing into one of them is writing into the other.
VIEWS = (
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze", "getitem", "chunk", "split", "narrow",
    "select", "slice", "expand", "expand_as", "view_as", "detach", "contiguous", "unbind", "movedim", "swapaxes", "t", "to", "float",
    "alias", "dropout", "identity",
)  # fmt: skip
VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


class ClippedReLU(nn.Module):
    """``min(relu(x), upper)`` in one pass over ``x``: a ReLU and its bound, to the same bits."""

    upper: Tensor
    zero: Tensor

    def __init__(self, bound: Bound) -> None:
        super().__init__()
        self.register_buffer("upper", bound.upper.detach().clone().view(bound.view))
        self.register_buffer("zero", torch.zeros_like(self.upper))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.zero.to(x.dtype), self.upper.to(x.dtype))


class Clip(nn.Module):
    """What a :class:`Bound` gives, without its gradients: one pass for each of its sides."""

    upper: Tensor
    lower: Tensor | None

    def __init__(self, bound: Bound) -> None:
        super().__init__()
        self.register_buffer("upper", bound.upper.detach().clone().view(bound.view))
        self.register_buffer("lower", None if bound.lower is None else bound.lower.detach().clone().view(bound.view))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.minimum(x, self.upper.to(x.dtype))
        return x if self.lower is None else torch.maximum(x, self.lower.to(x.dtype))


class ServedNetwork(nn.Module):
    """The logits of a :class:`BoundedNetwork`, to the same bits: bounds that can cut nothing are left out, a ReLU and its bound are one
    pass. It learns nothing more; nothing is shared with the network that was given. ``fused=False`` leaves ReLUs alone, for a runtime that
    joins them to the layers before. ``folded`` computes a batch norm as a part of the layer before it: faster, and the same but for
    rounding."""

    def __init__(self, bounded: BoundedNetwork, *, fused: bool = True, folded: bool = False) -> None:
        super().__init__()
        self.network = _Copying(bounded, fused=fused, folded=folded).graph_module(both=False)
        self.offsets = copy.deepcopy(bounded.offsets)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits if self.offsets is None else self.offsets(logits)


class PairedNetwork(nn.Module):
    """Images (N, C, H, W) to the logits (N, K) of a model and of its bounded network; what lies in front of the first bound that can cut
    something is computed once. ``shared`` is the share of the model's graph that is, in [0, 1]. ``fused`` and ``folded`` as in
    :class:`ServedNetwork`."""

    def __init__(self, bounded: BoundedNetwork, *, fused: bool = True, folded: bool = False) -> None:
        super().__init__()
        copying = _Copying(bounded, fused=fused, folded=folded)
        self.network = copying.graph_module(both=True)
        self.shared = copying.shared
        self.offsets = copy.deepcopy(bounded.offsets)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, bounded_logits = self.network(images)
        return logits, bounded_logits if self.offsets is None else self.offsets(bounded_logits)


class NetworkPair(nn.Module):
    """The same from a model and a repair that have nothing in common."""

    def __init__(self, model: nn.Module, repaired: nn.Module) -> None:
        super().__init__()
        self.model, self.repaired = model, repaired

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(images), self.repaired(images)


def paired(model: nn.Module, repaired: nn.Module, *, fused: bool = True, folded: bool = False) -> PairedNetwork | NetworkPair:
    """What gives the logits of both for the same images, of the fewest passes over them.

    Both are computed in full where they have other weights. Copies, in evaluation mode: later changes of either have no effect.
    ``fused`` and ``folded`` as in :class:`ServedNetwork`.
    """
    with torch.inference_mode(False), torch.no_grad():
        pair = _paired(model, repaired, fused, folded)
    pair.eval().requires_grad_(False)
    return pair


def _paired(model: nn.Module, repaired: nn.Module, fused: bool, folded: bool) -> PairedNetwork | NetworkPair:
    if not isinstance(repaired, BoundedNetwork):
        return NetworkPair(copy.deepcopy(model), copy.deepcopy(repaired))
    if same_weights(model, repaired) and not _writes_into_what_is_read(repaired.network):
        return PairedNetwork(repaired, fused=fused, folded=folded)
    return NetworkPair(copy.deepcopy(model), ServedNetwork(repaired, fused=fused, folded=folded))


def same_weights(model: nn.Module, bounded: BoundedNetwork) -> bool:
    """Whether the bounded network computes with the weights and buffers of ``model``, name by name."""
    own, given = bounded.network.state_dict(), model.state_dict()
    return all(
        name in given and value.shape == given[name].shape and torch.equal(value.cpu(), given[name].cpu())
        for name, value in own.items()
        if not name.startswith("bound_")
    )


def _writes_into_what_is_read(network: fx.GraphModule) -> bool:
    """Whether a node writes into a tensor that others read afterwards, or that they may know under another name."""
    order = {node: place for place, node in enumerate(network.graph.nodes)}
    for node in order:
        if not _is_in_place(network, node):
            continue
        written = node.all_input_nodes[0]
        if any(order[user] > order[node] for user in written.users) or _is_a_view(network, written):
            return True
    return False


def _is_in_place(network: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name(node)
    return node.target in OUT_OF_PLACE or node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))


def _is_a_view(network: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), VIEW_MODULES)
    return node.op in ("placeholder", "get_attr") or _name(node) in VIEWS


def _name(node: fx.Node) -> str:
    """The name of the function, method or aten operator that a node calls."""
    what = called(node)
    return what if isinstance(what, str) else str(getattr(what, "__name__", ""))


class _Copying:
    """Writes a bounded network's graph anew: for the bounded network alone, or for the model and the bounded network.

    ``of_model`` and ``of_bounded`` map each node to its copy in either; where both need the same value there is one copy.
    """

    def __init__(self, bounded: BoundedNetwork, *, fused: bool, folded: bool) -> None:
        network = bounded.fused().network if folded else bounded.network
        assert isinstance(network, fx.GraphModule)
        self.source, self.fused = network, fused
        self.root = copy.deepcopy(network)
        self.graph = fx.Graph()
        self.of_model: dict[fx.Node, fx.Node] = {}
        self.of_bounded: dict[fx.Node, fx.Node] = {}
        self.shared = 0.0

    def graph_module(self, *, both: bool) -> fx.GraphModule:
        """The network: images to the bounded logits, or to the model's and the bounded ones."""
        self.both = both
        for node in self.source.graph.nodes:
            if node.op == "output":
                self.graph.output(self._result(node.args[0]))
            elif (bound := bound_at(self.source, node)) is not None:
                self._copy_bound(node, bound)
            else:
                self._copy(node)
        alike = [node for node, copied in self.of_model.items() if self.of_bounded[node] is copied]
        self.shared = len(alike) / max(1, len(self.of_model))
        return module_of(self.root, self.graph)

    def _result(self, logits: fx.Node) -> Any:
        return (self.of_model[logits], self.of_bounded[logits]) if self.both else self.of_bounded[logits]

    def _copy(self, node: fx.Node) -> None:
        alike = all(self.of_model[source] is self.of_bounded[source] for source in node.all_input_nodes)
        self.of_bounded[node] = self.graph.node_copy(node, lambda source: self.of_bounded[source])
        if alike or not self.both:
            self.of_model[node] = self.of_bounded[node]
            return
        self.of_model[node] = self.graph.node_copy(node, lambda source: self.of_model[source])
        for copied in (self.of_model[node], self.of_bounded[node]):  # one of its inputs may be common to both
            _make_out_of_place(copied)

    def _copy_bound(self, node: fx.Node, bound: Bound) -> None:
        (source,) = node.all_input_nodes
        self.of_model[node] = self.of_model[source]
        if not can_cut(bound):
            self.of_bounded[node] = self.of_bounded[source]
            return
        joined = self.fused and bound.lower is None and is_relu(self.source, source)
        module, given = (ClippedReLU(bound), source.all_input_nodes[0]) if joined else (Clip(bound), source)
        name = f"{node.target}_served"
        self.root.add_submodule(name, module)
        self.of_bounded[node] = self.graph.call_module(name, (self.of_bounded[given],))
        if not self.both:
            self.of_model[node] = self.of_bounded[node]


def module_of(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The network of a graph that was written anew, with those modules of ``root`` that it calls."""
    made = fx.GraphModule(root, graph)
    made.graph.eliminate_dead_code(lambda node: node.is_impure() or _is_read_elsewhere(made, node))
    made.delete_all_unused_submodules()
    made.graph.lint()
    made.recompile()
    return made


def _is_read_elsewhere(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether what a node writes in place is read under the name of its input, so that it counts though nobody uses its result."""
    return _is_in_place(network, node) and (
        len(node.all_input_nodes[0].users) > 1 or _is_a_view(network, node.all_input_nodes[0])
    )


def bound_at(network: fx.GraphModule, node: fx.Node) -> Bound | None:
    """The bound that the node calls, if it calls one."""
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Bound) else None


def can_cut(bound: Bound) -> bool:
    """Whether any of its numbers is finite."""
    return bool((bound.upper < float("inf")).any()) or (bound.lower is not None and bool((bound.lower > float("-inf")).any()))


def is_relu(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a ReLU, as a module, a function or a method."""
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target))) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in RELUS


def _make_out_of_place(node: fx.Node) -> None:
    if node.op == "call_function" and node.target in OUT_OF_PLACE:
        node.target = OUT_OF_PLACE[node.target]
    elif node.op == "call_function" and _name(node).endswith("_") and aten_name(node) is not None:
        node.target = out_of_place(node.target)  # type: ignore[arg-type]
    elif node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        node.target = str(node.target).rstrip("_")
