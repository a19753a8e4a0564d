"""Tracing a network, with torch.fx or else with torch.export, and which of its modules and functions are activations."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from marginclip.errors import UserError, first_line
from marginclip.networks.exporting import aten_name, export_graph, is_exported

Model = TypeVar("Model", bound=nn.Module)
# Functions that cannot go below zero: an upper bound is all they need. The others get a lower and an upper bound.
ONE_SIDED_MODULES = (nn.ReLU, nn.ReLU6, nn.Softplus)
TWO_SIDED_MODULES = (
    nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.PReLU, nn.RReLU, nn.Hardswish, nn.Mish, nn.Tanh,
    nn.Hardtanh, nn.Threshold, nn.GLU, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.LogSigmoid, nn.Softsign,
)  # fmt: skip
ONE_SIDED_FUNCTIONS = (F.relu, F.relu_, F.relu6, F.softplus, torch.relu, torch.relu_)
TWO_SIDED_FUNCTIONS = (
    F.leaky_relu, F.leaky_relu_, F.gelu, F.silu, F.elu, F.elu_, F.celu, F.selu, F.prelu, F.rrelu, F.hardswish, F.mish,
    torch.prelu, torch.selu, torch.celu, F.tanh, torch.tanh, F.hardtanh, F.hardtanh_, F.threshold, torch.threshold_, F.glu,
    F.softshrink, F.hardshrink, F.tanhshrink, F.logsigmoid, F.softsign,
)  # fmt: skip
# Methods of tensors, and aten operators of exported graphs.
ONE_SIDED_METHODS = ("relu", "relu_", "relu6", "relu6_", "softplus")
TWO_SIDED_METHODS = (
    "tanh", "tanh_", "leaky_relu", "leaky_relu_", "gelu", "gelu_", "silu", "silu_", "elu", "elu_", "celu", "celu_", "selu", "selu_",
    "prelu", "rrelu", "rrelu_", "hardswish", "hardswish_", "mish", "mish_", "hardtanh", "hardtanh_", "threshold", "threshold_", "glu",
    "softshrink", "hardshrink", "log_sigmoid",
)  # fmt: skip


def copied(model: Model) -> Model:
    """A copy of ``model`` that shares nothing with it.

    Raises :class:`UserError` for a model that keeps a tensor of an earlier forward pass together with how it was computed.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        if "deepcopy protocol" not in str(error):
            raise
        raise UserError(
            f"the model {type(model).__name__} cannot be copied: it keeps a tensor of an earlier forward pass with its gradient; load it "
            "anew, and make every call before this one under torch.no_grad()"
        ) from error


def trace(model: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    """A traced copy of ``model`` in evaluation mode that shares nothing with it.

    torch.fx traces it, or where that fails and ``example`` (N, C, H, W) is given, torch.export, for images of that size. Raises
    :class:`UserError` for a model that neither can trace, saying where and what to change.
    """
    check_traceable(model)
    own = copied(model).eval()
    try:
        traced = fx.symbolic_trace(own)
        _refuse_hidden_activations(traced)
        _refuse_other_logits(own, traced, example)
        return traced
    except Exception as error:
        reason = first_line(error)
        if example is None:
            raise UserError(f"the model {type(model).__name__} cannot be traced by torch.fx ({reason}); {ADVICE}") from error
    try:
        untouched = copied(model).eval()  # a forward that torch.fx gave up on may have left something in the other copy
        parameter = next(untouched.parameters(), example)
        traced = export_graph(untouched, example.to(parameter.device, parameter.dtype))
        _refuse_other_logits(own, traced, example)
        return traced
    except Exception as error:
        raise UserError(
            f"the model {type(model).__name__} cannot be traced by torch.fx ({reason}) nor by torch.export ({first_line(error)}); {ADVICE}"
        ) from error


@torch.no_grad()
def agree(model: nn.Module, other: nn.Module, example: Tensor) -> bool:
    """Whether both give the same logits, up to rounding, for two copies of the first image of ``example`` (N, C, H, W).

    True as well where that cannot be told: of a model that does not take this image, or draws random numbers.
    """
    with torch.inference_mode(False), torch.no_grad():
        parameter = next(model.parameters(), example)
        images = torch.cat([example[:1].detach().to(parameter.device, parameter.dtype)] * 2)
        try:
            wanted, again = model(images.clone()), model(images.clone())
        except Exception:  # whoever called this meets it, too
            return True
        if not (isinstance(wanted, Tensor) and isinstance(again, Tensor) and _close(wanted, again)):
            return True
        try:
            found = other(images.clone())
        except Exception:  # whatever a graph does that is not the model's
            return False
    return isinstance(found, Tensor) and _close(wanted, found)


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two sets of logits differ by less than a hundredth of the largest, more than rounding does in any precision."""
    largest = float(one.float().nan_to_num(0, 0, 0).abs().max()) if one.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=0, atol=0.01 * largest, equal_nan=True)


def _refuse_other_logits(model: nn.Module, traced: nn.Module, example: Tensor | None) -> None:
    """Raise :class:`UserError` for a graph that does not compute what ``model`` does."""
    if example is not None and not agree(model, traced, example):
        raise UserError(
            "the traced network gives other logits than the model, as where a hook on the model itself changes them, or a branch depends "
            "on an argument that is not given"
        )


ADVICE = (
    "write its forward without branches or loops that depend on tensor values, its activations as torch.nn layers, make its modules in "
    "__init__, or wrap a function that cannot be traced with torch.fx.wrap"
)


def _refuse_hidden_activations(traced: fx.GraphModule) -> None:
    """Raise :class:`UserError` for activations inside a fused torch module."""
    functions = ONE_SIDED_FUNCTIONS + TWO_SIDED_FUNCTIONS
    for node in traced.graph.nodes:
        if node.op != "call_module":
            continue
        leaf = traced.get_submodule(node.target)
        hidden = [name for name, part in leaf.named_modules() if name and is_activation(part)]
        hidden += [
            name
            for part in leaf.modules()
            for name, value in vars(part).items()
            if any(value is function for function in functions)
        ]
        if hidden:
            raise UserError(f"the layer '{node.target}' ({type(leaf).__name__}) hides its activation '{hidden[0]}'")


def called(node: fx.Node) -> Any:
    """What a node calls: a function, or the name of a method, a module or an aten operator."""
    return aten_name(node) or node.target


def check_traceable(model: nn.Module) -> None:
    """Raise :class:`UserError` for what torch has turned into something else already, saying what to give instead."""
    if isinstance(model, torch.export.ExportedProgram) or is_exported(model):
        raise UserError("the model is an exported program: give marginclip.models.from_program(program)")
    if not isinstance(model, nn.Module):
        raise UserError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UserError(f"the model is wrapped in {type(model).__name__}: give the network inside, model.module")
    if hasattr(model, "_orig_mod"):
        raise UserError("the model is compiled: give the network inside, model._orig_mod")
    if any(".quantized" in type(part).__module__ for part in model.modules()):
        raise UserError("the model is quantised: give the network in full precision, whose activations can be bounded")
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise UserError(
            "a TorchScript model, or one with such a part, cannot be traced: give the network that it was made from"
        )


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation that can be bounded."""
    return isinstance(module, ONE_SIDED_MODULES + TWO_SIDED_MODULES)
