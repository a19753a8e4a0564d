"""The second tracer: ``torch.export`` gives a graph of aten operators where torch.fx cannot trace."""

from __future__ import annotations

import inspect
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from marginclip.errors import require

aten = torch.ops.aten
CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size")


def export_graph(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The aten operators of ``model`` on any number of images of the size of ``example`` (N, C, H, W); weights are shared.

    Raises whatever ``torch.export`` raises, and :class:`UserError` for a graph that cannot be taken apart.
    """
    batch = torch.cat([example[:1]] * 2).detach().clone()
    with _quiet(), torch.inference_mode(False), torch.enable_grad():  # without gradients torch fuses layers
        program = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
        return plain_graph(program.module(), tuple(batch.shape[1:]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch keeps its advice to itself: whoever asks for a traced network hears what matters in an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # where torch prints the graph of a failure
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def is_exported(module: Any) -> bool:
    """Whether a module is what ``ExportedProgram.module()`` gives."""
    return isinstance(module, fx.GraphModule) and "inline_constraints" in module.meta


def plain_graph(program: fx.GraphModule, size: tuple[Any, ...] | None = None, output: str | None = None) -> fx.GraphModule:
    """The graph of an exported program as one that takes images and gives logits, moves to any device, and can be changed.

    ``size`` (C, H, W) are the only images that it takes, None what the program itself says. ``output`` names what holds the logits in an
    object or a dictionary. Raises :class:`UserError` for programs of several inputs, other results, and control flow.
    """
    graph = fx.Graph()
    kept: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(program.graph, kept)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    require(len(inputs) == 1, f"the exported program takes {len(inputs)} inputs, not images alone")
    (images,) = inputs
    graph.output(_logits(result, program, output))
    _refuse_control_flow(graph, program)
    _drop_checks(graph)
    _follow_the_device(graph, images)
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default  # the same, and for images that are channels-last, too
    _check_size(graph, images, _size(images) if size is None else size)
    graph.lint()
    return fx.GraphModule(program, graph, "Exported")


def aten_name(node: fx.Node) -> str | None:
    """The name of the aten operator that a node calls, such as ``relu_``; None for other nodes."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    return str(node.target._schema.name).removeprefix("aten::")


def out_of_place(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The operator that computes what an in-place one does, such as ``relu`` for ``relu_``."""
    packet = getattr(aten, str(target._schema.name).removeprefix("aten::").removesuffix("_"))
    plain: torch._ops.OpOverload = getattr(packet, target._overloadname)
    return plain


def module_path(node: fx.Node) -> tuple[str, str]:
    """The path of the module that a node of an exported graph was called in, and the name of the module's class; empty if unknown."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", ""
    path, kind = stack[-1]
    name = kind.__name__ if inspect.isclass(kind) else str(kind).rpartition(".")[2]
    return str(path), name


def _logits(result: Any, program: fx.GraphModule, output: str | None) -> fx.Node:
    """The node of the logits in the flat results of a program."""
    flat = list(result) if isinstance(result, (tuple, list)) else [result]
    spec: Any = getattr(program, "_out_spec", None) or getattr(program.graph._codegen, "pytree_info", None)
    spec = getattr(spec, "out_spec", spec)  # a code generator holds the shapes of inputs and results
    place: Any = flat if spec is None else pytree.tree_unflatten(flat, spec)
    if output is not None:
        place = place.get(output) if isinstance(place, dict) else getattr(place, output, None)
    elif isinstance(place, (tuple, list)) and len(place) == 1:
        (place,) = place
    require(
        isinstance(place, fx.Node),
        f"the network must return one tensor of logits, not a {type(place).__name__}; model.output names the part of an object or "
        "dictionary that holds them",
    )
    return place  # type: ignore[no-any-return]


def _refuse_control_flow(graph: fx.Graph, program: fx.GraphModule) -> None:
    for node in graph.nodes:
        if node.op == "get_attr":
            holder, _, name = str(node.target).rpartition(".")
            require(
                not isinstance(getattr(program.get_submodule(holder), name), fx.GraphModule),
                "the network has a part of its own behind torch.cond, torch.autocast or torch.no_grad, whose activations cannot be bounded",
            )


def _drop_checks(graph: fx.Graph) -> None:
    """Leave out what the program asserts about its input and devices, and weights that nothing reads."""
    for node in reversed(graph.nodes):
        guards = node.op == "call_module" and node.target == "_guards_fn"
        if guards or aten_name(node) in CHECKS or (node.op == "get_attr" and not node.users):
            graph.erase_node(node)


def _follow_the_device(graph: fx.Graph, images: fx.Node) -> None:
    """Make tensors where the images are, not where the network was exported."""
    with graph.inserting_after(images):
        device = graph.call_function(getattr, (images, "device"))
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, lambda value: device if isinstance(value, torch.device) else value)
            node.kwargs = fx.node.map_aggregate(node.kwargs, lambda value: device if isinstance(value, torch.device) else value)
    if not device.users:
        graph.erase_node(device)


def _size(images: fx.Node) -> tuple[Any, ...]:
    """(C, H, W) of the images that a program takes; other things than numbers where any will do."""
    value = images.meta.get("val")
    return () if value is None else tuple(value.shape[1:])


def _check_size(graph: fx.Graph, images: fx.Node, size: tuple[Any, ...]) -> None:
    """Let the graph refuse images of another size than the one that its numbers were computed for."""
    if not size or not all(isinstance(side, int) for side in size):
        return
    told = f"the network was traced for images of {' x '.join(map(str, size))} and takes no others"
    with graph.inserting_after(images):
        shape = graph.call_function(getattr, (images, "shape"))
    with graph.inserting_after(shape):
        found = graph.call_function(operator.getitem, (shape, slice(1, None)))
    with graph.inserting_after(found):
        same = graph.call_function(operator.eq, (found, size))
    with graph.inserting_after(same):
        graph.call_function(torch._assert, (same, told))
