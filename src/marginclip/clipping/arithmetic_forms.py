"""Activations that are written out as products: a tensor times a gate that is computed from that very tensor."""

from __future__ import annotations

import operator
from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import fx, nn

from marginclip.networks.tracing import called

CASTS = ("float", "half", "double", "to", "type", "type_as", "_to_copy")
PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
QUOTIENTS = (operator.truediv, torch.div, torch.divide, "div", "divide")
COMPARISONS = (operator.gt, torch.gt, "gt", operator.ge, torch.ge, "ge")
GATES = (  # the last ones as they are called in exported graphs
    *COMPARISONS, torch.sigmoid, F.sigmoid, torch.special.expit, "sigmoid", F.hardsigmoid, torch.tanh, F.tanh, "tanh", torch.exp, "exp",
    torch.abs, "abs", torch.erf, torch.special.erf, "erf", F.relu6, "hardsigmoid", "special_expit", "special_erf", "relu6", "hardtanh",
)  # fmt: skip
GATE_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.ReLU6)
ELEMENTWISE = PRODUCTS + GATES + (
    operator.add, operator.sub, operator.truediv, operator.neg, operator.pow, torch.add, torch.sub, torch.div, torch.neg, torch.pow,
    torch.square, "add", "sub", "div", "neg", "pow", "square", F.softplus, "softplus", "rsub",
    *CASTS,
)  # fmt: skip


def gates_itself(traced: fx.GraphModule, node: fx.Node, known: Container[fx.Node]) -> bool:
    """Whether ``node`` is such a product, like x * sigmoid(x), 0.5 * x * (1 + erf(x / sqrt(2))), x * relu6(x + 3) / 6, x * (x > 0), or
    x / (1 + exp(-x)).

    The gate must be computed element by element, so that squeeze-and-excitation and attention, whose gates look at the whole
    image, are none. ``known`` are the products that were found before ``node``.
    """
    factors = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or called(node) not in PRODUCTS + QUOTIENTS or len(factors) != 2:
        return False
    (first, first_gated), (second, second_gated) = (elements_of(traced, factor, known) for factor in factors)
    if called(node) in QUOTIENTS and first_gated:
        return False
    return first_gated != second_gated and not first.isdisjoint(second)


def is_maximum_with_zero(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is ``where(x > 0, x, 0)`` or ``maximum(x, zeros)``: a ReLU that is written out."""
    if node.op not in ("call_function", "call_method") or node.kwargs:
        return False
    if called(node) in (torch.where, "where") and len(node.args) == 3:
        condition, value, otherwise = node.args
        return (
            isinstance(condition, fx.Node)
            and called(condition) in COMPARISONS
            and condition.args == (value, 0)
            and _is_zero(traced, otherwise)
        )
    if called(node) in (torch.maximum, "maximum", torch.max, "max") and len(node.args) == 2:
        return sum(_is_zero(traced, value) for value in node.args) == 1 and all(
            isinstance(value, fx.Node) for value in node.args
        )
    return False


def _is_zero(traced: fx.GraphModule, value: object) -> bool:
    """Whether an argument is the number 0 or a tensor of zeros, as far as the graph tells."""
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float)) and value == 0
    if value.op == "get_attr":
        holder, _, name = str(value.target).rpartition(".")
        tensor = getattr(traced.get_submodule(holder), name, None)
        return isinstance(tensor, torch.Tensor) and tensor.numel() == 1 and not bool(tensor.any())
    name = called(value)
    if name in (torch.zeros_like, torch.zeros, "zeros_like", "new_zeros", "zeros"):
        return True
    return name in ("scalar_tensor", "full", "full_like", torch.full_like) and 0 in value.args[-1:]


def is_positive_part(node: fx.Node) -> bool:
    """Whether such a product is x * (x > 0), which is never below zero; also with the comparison as a number."""
    gates = [_before_casts(factor) for factor in node.all_input_nodes]
    return any(called(gate) in COMPARISONS and gate.args[1:] == (0,) and gate.args[0] in node.all_input_nodes for gate in gates)


def _before_casts(node: fx.Node) -> fx.Node:
    while node.op in ("call_function", "call_method") and called(node) in CASTS:
        node = node.all_input_nodes[0]
    return node


def elements_of(traced: fx.GraphModule, node: fx.Node, known: Container[fx.Node] = ()) -> tuple[set[fx.Node], bool]:
    """The tensors that ``node`` is computed from element by element, itself among them, and whether a gate is on the way; not what is
    behind the ``known`` ones."""
    reached, gated, waiting = set[fx.Node](), False, [node]
    while waiting:
        current = waiting.pop()
        if current in reached:
            continue
        reached.add(current)
        if current.op == "call_module":
            gate = elementwise = isinstance(traced.get_submodule(str(current.target)), GATE_MODULES)
        else:
            name = called(current) if current.op in ("call_function", "call_method") else None
            gate, elementwise = name in GATES, name in ELEMENTWISE
        gated = gated or gate
        if elementwise and current not in known:
            waiting.extend(current.all_input_nodes)
    return reached, gated
