"""Tracing a network with torch.fx, and which of its modules and functions are activations."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import fx, nn

from marginclip.errors import UserError, first_line

# Functions that cannot go below zero: an upper bound is all they need. The others get a lower and an upper bound.
ONE_SIDED_MODULES = (nn.ReLU, nn.ReLU6, nn.Softplus)
TWO_SIDED_MODULES = (
    nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.PReLU, nn.RReLU, nn.Hardswish, nn.Mish, nn.Tanh,
    nn.Hardtanh, nn.Threshold, nn.GLU,
)  # fmt: skip
ONE_SIDED_FUNCTIONS = (F.relu, F.relu_, F.relu6, F.softplus, torch.relu, torch.relu_)
TWO_SIDED_FUNCTIONS = (
    F.leaky_relu, F.leaky_relu_, F.gelu, F.silu, F.elu, F.elu_, F.celu, F.selu, F.prelu, F.rrelu, F.hardswish, F.mish,
    torch.prelu, torch.selu, torch.celu, F.tanh, torch.tanh, F.hardtanh, F.hardtanh_, F.threshold, torch.threshold_, F.glu,
)  # fmt: skip
ONE_SIDED_METHODS, TWO_SIDED_METHODS = ("relu", "relu_"), ("tanh",)


def trace(model: nn.Module) -> fx.GraphModule:
    """A traced copy of ``model`` in evaluation mode that shares nothing with it.

    Raises :class:`UserError` for a model that torch.fx cannot trace, saying where and what to change, and for activations
    hidden inside a fused torch module.
    """
    check_traceable(model)
    own = copy.deepcopy(model).eval()
    try:
        traced = fx.symbolic_trace(own)
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"the model {type(model).__name__} cannot be traced by torch.fx ({reason}); "
            "write its forward without branches or loops that depend on tensor values, sizes among them, make its modules in "
            "__init__, or wrap a function that cannot be traced with torch.fx.wrap"
        ) from error
    for node in traced.graph.nodes:
        if node.op == "call_module":
            leaf = traced.get_submodule(node.target)
            hidden = [name for name, part in leaf.named_modules() if name and is_activation(part)]
            functions = ONE_SIDED_FUNCTIONS + TWO_SIDED_FUNCTIONS
            hidden += [
                name
                for part in leaf.modules()
                for name, value in vars(part).items()
                if any(value is function for function in functions)
            ]
            if hidden:
                raise UserError(
                    f"the layer '{node.target}' ({type(leaf).__name__}) hides its activation '{hidden[0]}' from tracing; "
                    "write it out with torch.nn layers so that its activations can be bounded"
                )
    return traced


def check_traceable(model: nn.Module) -> None:
    """Raise :class:`UserError` for what torch has turned into something else already, saying what to give instead."""
    if not isinstance(model, nn.Module):
        raise UserError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UserError(f"the model is wrapped in {type(model).__name__}: give the network inside, model.module")
    if hasattr(model, "_orig_mod"):
        raise UserError("the model is compiled: give the network inside, model._orig_mod")
    if any(".quantized" in type(part).__module__ for part in model.modules()):
        raise UserError("the model is quantised: give the network in full precision, whose activations can be bounded")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("a TorchScript model cannot be traced again: give the network that it was made from")
    if isinstance(model, fx.GraphModule) and "inline_constraints" in model.meta:
        raise UserError("an exported program cannot be traced again: give the network that it was made from")


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation that can be bounded."""
    return isinstance(module, ONE_SIDED_MODULES + TWO_SIDED_MODULES)
