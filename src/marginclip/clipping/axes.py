"""Where the channels are in every tensor of an exported graph."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import fx

from marginclip.networks.exporting import aten_name

Shape = tuple[int, ...]
# Layers that give channels, or work along them, whatever was before: on axis 1, and on the last axis.
ON_AXIS_1 = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "convolution", "batch_norm", "group_norm", "instance_norm")
ON_LAST_AXIS = ("linear", "layer_norm", "rms_norm")
RESHAPING = ("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")


def channel_axes(graph: fx.Graph, shapes: Mapping[fx.Node, Shape]) -> dict[fx.Node, int]:
    """The axis of the channels, from 0 up, of the tensors of a graph of aten operators, where it can be told.

    ``shapes`` are those of the tensors. Convolutions put channels on axis 1, linear layers on the last one; from there they are followed
    through permutations, changes of shape and operations element by element.
    """
    axes: dict[fx.Node, int] = {}
    for node in graph.nodes:
        name = aten_name(node)
        if name is None or node not in shapes:
            continue
        if name in ON_AXIS_1:
            axes[node] = 1
        elif name in ON_LAST_AXIS:
            axes[node] = len(shapes[node]) - 1
        else:
            source = next(
                (each for each in node.all_input_nodes if each in axes and _passes_on(name, each, node, shapes)), None
            )
            axis = None if source is None else _moved(name, node, axes[source], shapes[source], shapes[node])
            if axis is not None:
                axes[node] = axis
    return axes


def _passes_on(name: str, source: fx.Node, node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> bool:
    """Whether a tensor is what an operator moves or changes, not a smaller one beside it."""
    return name in (*RESHAPING, "permute", "transpose", "cat") or len(shapes[source]) == len(shapes[node])


def _moved(name: str, node: fx.Node, axis: int, before: Shape, after: Shape) -> int | None:
    """Where an operator puts the channels that were on ``axis`` of its input; None where they are no axis of their own any more."""
    arguments: Any = node.args[1:]
    if name == "permute":
        order: list[int] = [each % len(before) for each in arguments[0]]
        return order.index(axis)
    if name == "transpose":
        one, other = (each % len(before) for each in arguments[:2])
        return int({one: other, other: one}.get(axis, axis))
    if name in RESHAPING:
        found = (
            each for each in range(1, len(after)) if after[each] == before[axis] and prod(after[:each]) == prod(before[:axis])
        )
        return next(found, None)
    return axis if len(before) == len(after) else None
