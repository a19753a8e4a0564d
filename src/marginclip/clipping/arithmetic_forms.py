"""Activations that are written out as products: a tensor times a gate that is computed from that very tensor."""

from __future__ import annotations

import operator
from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import fx, nn

from marginclip.networks.tracing import called

PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
COMPARISONS = (operator.gt, torch.gt, "gt", operator.ge, torch.ge, "ge")
GATES = (  # the last ones as they are called in exported graphs
    *COMPARISONS, torch.sigmoid, F.sigmoid, torch.special.expit, "sigmoid", F.hardsigmoid, torch.tanh, F.tanh, "tanh",
    torch.erf, torch.special.erf, "erf", F.relu6, "hardsigmoid", "special_expit", "special_erf", "relu6", "hardtanh",
)  # fmt: skip
GATE_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.ReLU6)
ELEMENTWISE = PRODUCTS + GATES + (
    operator.add, operator.sub, operator.truediv, operator.neg, operator.pow, torch.add, torch.sub, torch.div, torch.neg, torch.pow,
    torch.square, "add", "sub", "div", "neg", "pow", "square", F.softplus, "softplus", "rsub",
)  # fmt: skip


def gates_itself(traced: fx.GraphModule, node: fx.Node, known: Container[fx.Node]) -> bool:
    """Whether ``node`` is such a product, like x * sigmoid(x), 0.5 * x * (1 + erf(x / sqrt(2))), x * relu6(x + 3) / 6, x * (x > 0).

    The gate must be computed element by element, so that squeeze-and-excitation and attention, whose gates look at the whole
    image, are none. ``known`` are the products that were found before ``node``.
    """
    factors = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or called(node) not in PRODUCTS or len(factors) != 2:
        return False
    (first, first_gated), (second, second_gated) = (elements_of(traced, factor, known) for factor in factors)
    return first_gated != second_gated and not first.isdisjoint(second)


def is_positive_part(node: fx.Node) -> bool:
    """Whether such a product is x * (x > 0), which is never below zero."""
    return any(
        called(factor) in COMPARISONS and factor.args[1:] == (0,) and factor.args[0] in node.all_input_nodes
        for factor in node.all_input_nodes
    )


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
