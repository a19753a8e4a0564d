"""Finding every activation call of a traced model, and the channel axis of what it gives."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from marginclip.clipping.arithmetic_forms import elements_of, gates_itself, is_maximum_with_zero, is_positive_part
from marginclip.clipping.axes import channel_axes
from marginclip.errors import UserError
from marginclip.networks.exporting import aten_name, module_path, out_of_place
from marginclip.networks.tracing import (
    ONE_SIDED_FUNCTIONS,
    ONE_SIDED_METHODS,
    ONE_SIDED_MODULES,
    TWO_SIDED_FUNCTIONS,
    TWO_SIDED_METHODS,
    TWO_SIDED_MODULES,
    called,
    is_activation,
)  # fmt: skip

ACTIVATION_CLASSES = {kind.__name__ for kind in ONE_SIDED_MODULES + TWO_SIDED_MODULES}
IN_PLACE_FUNCTIONS = (F.relu_, torch.relu_, F.leaky_relu_, F.elu_, F.hardtanh_, torch.threshold_, operator.imul)
# Modules between a layer and its activation that leave the meaning of the axes alone.
TRANSPARENT = (nn.Dropout, nn.Identity, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)


@dataclass(frozen=True)
class Site:
    """One activation call: its graph node, the number of channels, their axis, and whether it needs a lower bound.

    ``size`` is the rest of the shape: the resolution (H, W) of feature maps, empty for neurons of a dense layer.
    """

    name: str
    node: fx.Node
    num_channels: int
    axis: int
    num_axes: int
    two_sided: bool
    size: tuple[int, ...] = ()


def find_sites(traced: fx.GraphModule, example: Tensor, *, channel_axis: int | None = None) -> list[Site]:
    """All activation calls of a traced model, in the order of execution.

    ``example`` (1, C, H, W) gives the shapes. ``channel_axis`` overrides the axis of outputs with more than two axes (1, or -1
    for a network that keeps channels last); None decides for each call: the last axis behind a linear layer, else axis 1.
    """
    shapes = _ShapeRecorder(traced)
    with torch.inference_mode(False), torch.no_grad():
        shapes.run(example.detach().clone())
    sites: list[Site] = []
    followed = channel_axes(traced.graph, shapes.shapes)
    for node, two_sided in _activation_calls(traced):
        shape = shapes.shapes.get(node)
        if shape is None or len(shape) < 2:
            raise UserError(
                f"the activation '{node.name}' gives no batch of feature maps (shape {shape}); it cannot be bounded"
            )
        axis = followed.get(node, _channel_axis(traced, node, len(shape)))
        if channel_axis is not None and len(shape) > 2:
            axis = channel_axis
        if not -len(shape) <= axis < len(shape) or axis % len(shape) == 0:
            raise UserError(f"channel_axis must be an axis in 1..{len(shape) - 1} or its negative, got {axis}")
        name = f"{len(sites):03d}_{_readable(node)}"
        size = tuple(side for number, side in enumerate(shape) if number not in (0, axis % len(shape)))
        sites.append(Site(name, node, shape[axis], axis % len(shape), len(shape), two_sided, size))
    return sites


def choose_sites(sites: Sequence[Site], wanted: str | Sequence[str]) -> list[Site]:
    """The activation calls to bound: ``all``, ``last``, ``first_half``, or those of the given names, in the order of execution.

    ``last`` is the last call with a linear or convolutional layer behind it: in a residual network the features in front of the
    classifier, never an activation of the logits.
    ``first_half`` is the first activation and the last one at each of the first half (rounded up) of the resolutions, so in a
    ResNet-18 those behind the stem and the stages 1 and 2; in a network without feature maps the first half of the activations.
    A name is that of its bounds (``004_layer1_1_act2``), with or without the number. Raises :class:`UserError` for others.
    """
    if wanted == "all" or not sites:
        return list(sites)
    if wanted == "last":
        return [next((site for site in reversed(sites) if _feeds_a_layer(site.node)), sites[-1])]
    if wanted == "first_half":
        last = {site.size: site.name for site in sites if site.size}
        half = list(last.values())[: (len(last) + 1) // 2] or [site.name for site in sites[: (len(sites) + 1) // 2]]
        return [site for site in sites if site.name in {sites[0].name, *half}]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    known = {alias for site in sites for alias in (site.name, site.name[4:])}
    odd = [name for name in names if name not in known]
    if odd or not names:
        raise UserError(
            f"defense.sites must be all, last, first_half or names of activations, got '{odd[0] if odd else names}'; "
            f"this model has {', '.join(site.name for site in sites)}"
        )
    return [site for site in sites if site.name in names or site.name[4:] in names]


LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
LAYER_FUNCTIONS = (
    F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, operator.matmul, "linear", "conv1d", "conv2d", "conv3d", "matmul",
)  # fmt: skip


def _feeds_a_layer(node: fx.Node) -> bool:
    """Whether what a node gives reaches a linear or convolutional layer, or any module with weights that is not a normalisation."""
    network = node.graph.owning_module
    assert network is not None
    reached, waiting = set[fx.Node](), list(node.users)
    while waiting:
        user = waiting.pop()
        if user in reached:
            continue
        reached.add(user)
        if user.op == "call_function" and called(user) in LAYER_FUNCTIONS:
            return True
        if user.op == "call_module":
            module = network.get_submodule(str(user.target))
            if isinstance(module, LAYERS) or (
                not _normalises(module) and any(value.dim() > 1 for value in module.parameters())
            ):
                return True
        waiting.extend(user.users)
    return False


def _normalises(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))


def make_out_of_place(traced: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Turn in-place activation calls into plain ones; what used their overwritten inputs afterwards uses their outputs.

    ``nodes`` are all activation calls: a module that is called several times is in place in all of its calls, or in none.
    """
    for node in [each for each in nodes if _is_in_place(traced, each)]:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(source, fx.Node):
            _make_plain(traced, node, source)


def _make_plain(traced: fx.GraphModule, node: fx.Node, source: fx.Node) -> None:
    if node.op == "call_module":
        traced.get_submodule(str(node.target)).inplace = False  # type: ignore[assignment]
    elif node.op == "call_method":
        node.target = str(node.target).rstrip("_")
    elif aten_name(node) is not None:
        node.target = out_of_place(node.target)  # type: ignore[arg-type]
    elif node.target in IN_PLACE_FUNCTIONS:
        plain: dict[Any, Callable[..., Any]] = {
            F.relu_: F.relu, torch.relu_: F.relu, F.leaky_relu_: F.leaky_relu, F.elu_: F.elu, F.hardtanh_: F.hardtanh,
            torch.threshold_: F.threshold, operator.imul: operator.mul,
        }  # fmt: skip
        node.target = plain[node.target]
    else:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        node.args = tuple(
            False if isinstance(value, bool) and position > 0 else value for position, value in enumerate(node.args)
        )
    order = {each: position for position, each in enumerate(traced.graph.nodes)}
    for user in list(source.users):
        if order[user] > order[node]:
            user.replace_input_with(source, node)


def _activation_calls(traced: fx.GraphModule) -> Iterator[tuple[fx.Node, bool]]:
    products = set[fx.Node]()
    for node in traced.graph.nodes:
        if node.op == "call_module":
            module = traced.get_submodule(node.target)
            if is_activation(module):
                yield node, not isinstance(module, ONE_SIDED_MODULES) and not _has_floor(module, node)
        elif node.op in ("call_function", "call_method"):
            if (
                called(node) in (*ONE_SIDED_FUNCTIONS, *ONE_SIDED_METHODS)
                or _is_clamp_at_zero(traced, node)
                or is_maximum_with_zero(traced, node)
            ):
                yield node, False
            elif called(node) in (*TWO_SIDED_FUNCTIONS, *TWO_SIDED_METHODS):
                yield node, not _has_floor(called(node), node)
            elif gates_itself(traced, node, products):
                products.add(node)
                yield node, not is_positive_part(node)


def _has_floor(activation: Any, node: fx.Node) -> bool:
    """Whether a Hardtanh or Threshold is set to give nothing below zero."""
    if isinstance(activation, nn.Hardtanh):
        return bool(activation.min_val >= 0)
    if isinstance(activation, nn.Threshold):
        return bool(activation.threshold >= 0 and activation.value >= 0)
    if activation in (F.hardtanh, F.hardtanh_, "hardtanh", "hardtanh_"):
        lowest = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", -1.0)
        return isinstance(lowest, (int, float)) and lowest >= 0
    if activation in (F.threshold, torch.threshold_, "threshold", "threshold_"):
        given = [*node.args[1:3], *(node.kwargs[key] for key in ("threshold", "value") if key in node.kwargs)]
        return all(isinstance(value, (int, float)) and value >= 0 for value in given)
    return False


def _is_clamp_at_zero(traced: fx.GraphModule, node: fx.Node) -> bool:
    """``x.clamp(min=0)`` and its spellings are ReLUs too; with a ``max`` as well, unless it is the images that are clamped."""
    if called(node) not in (torch.clamp, torch.clamp_min, "clamp", "clamp_", "clamp_min", "clamp_min_"):
        return False
    values = dict(zip(("min", "max"), node.args[1:], strict=False)) | dict(node.kwargs)
    if values.get("min") != 0:
        return False
    return values.get("max") is None or all(
        source.op != "placeholder" for source in elements_of(traced, node.all_input_nodes[0])[0]
    )


def _is_in_place(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    if isinstance(called(node), str):
        return str(called(node)).endswith("_")
    return (
        node.target in IN_PLACE_FUNCTIONS or node.kwargs.get("inplace") is True or any(value is True for value in node.args[1:])
    )


def _channel_axis(traced: fx.GraphModule, node: fx.Node, num_axes: int) -> int:
    if num_axes == 2:
        return 1
    source = node.args[0] if node.args else None
    while isinstance(source, fx.Node) and source.op == "call_module":
        module = traced.get_submodule(str(source.target))
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            return -1
        if not isinstance(module, TRANSPARENT):
            return 1
        source = source.args[0] if source.args else None
    return -1 if isinstance(source, fx.Node) and source.target in (F.linear, F.layer_norm) else 1


def _readable(node: fx.Node) -> str:
    path, kind = module_path(node)
    if node.op == "call_module":
        name = str(node.target)
    elif aten_name(node) is None or not path:
        name = node.name
    else:
        name = path if kind in ACTIVATION_CLASSES else f"{path}_{str(aten_name(node)).rstrip('_')}"
    return name.replace(".", "_")


class _ShapeRecorder(fx.Interpreter):
    """Runs the graph once and notes the shape of every tensor."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result
