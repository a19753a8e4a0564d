"""Copies of a network: as it is, to be trained, or frozen with its batch norms folded into the layers before them."""

from __future__ import annotations

from collections import Counter
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from marginclip.errors import UserError
from marginclip.networks.layout import contiguous_input, lay_out_for_training
from marginclip.networks.tracing import Model, agree, copied, trace


def own_copy(model: Model) -> Model:
    """A copy of ``model`` that shares nothing with it, in evaluation mode and its own memory layout: its logits are the same bits."""
    with torch.inference_mode(False):
        return copied(model).eval()


def trainable_copy(model: Model) -> Model:
    """A copy of ``model`` that shares nothing with it and whose every parameter can be learned, in the layout to train it in."""
    with torch.inference_mode(False):
        own = copied(model)
        lay_out_for_training(own)
    return own.requires_grad_(True)


def fold_batch_norms(traced: fx.GraphModule) -> fx.GraphModule | None:
    """``traced``, changed in place, without the batch norms that can be folded; None where that would not be exact.

    A layer that is called twice would have its batch norm folded in twice. One whose weight is computed at each call, as by
    ``weight_norm``, has none to fold into. And a batch norm behind an ``nn.Linear`` is over its features only where these are the second
    of two axes. Equal to the network in evaluation mode, up to rounding.
    """
    if _has_computed_weights(traced) or _normalises_a_dense_layer(traced):
        return None
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    if any(count > 1 and list(traced.get_submodule(name).parameters()) for name, count in calls.items()):
        return None
    try:
        return cast(fx.GraphModule, fuse(traced, inplace=True, no_trace=True))
    except (KeyError, AttributeError, RuntimeError, TypeError):
        return None


def _has_computed_weights(traced: fx.GraphModule) -> bool:
    """Whether a module has a hook that runs before it, such as those of the older ``weight_norm`` and ``spectral_norm``."""
    hooks = (hook for module in traced.modules() for hook in module._forward_pre_hooks.values())
    return any(hook is not contiguous_input for hook in hooks)


def _normalises_a_dense_layer(traced: fx.GraphModule) -> bool:
    kinds = {node: type(traced.get_submodule(str(node.target))) for node in traced.graph.nodes if node.op == "call_module"}
    return any(
        kind is nn.BatchNorm1d and any(kinds.get(source) is nn.Linear for source in node.all_input_nodes)
        for node, kind in kinds.items()
    )


def frozen_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``model`` in evaluation mode whose weights need no gradient, batch norms folded where that is exact.

    A model that torch.fx cannot trace, or traces to something else for ``example`` (1, C, H, W), is copied as it is.
    """
    own = copied(model).eval()
    try:
        network: nn.Module = fold_batch_norms(trace(model)) or own
        if not agree(own, network, example):
            network = own
    except UserError:
        network = own
    return network.eval().requires_grad_(False)
