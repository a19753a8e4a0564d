"""Copies of a network: as it is, to be trained, or frozen with its batch norms folded into the layers before them."""

from __future__ import annotations

from collections import Counter
from typing import cast

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

from marginclip.errors import UserError
from marginclip.networks.layout import lay_out_for_training
from marginclip.networks.tracing import Model, copied, trace


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
    """``traced``, changed in place, without the batch norms that can be folded; None where a layer is called twice.

    Such a layer would have its batch norm folded in twice. Equal to the network in evaluation mode, up to rounding.
    """
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    if any(count > 1 and list(traced.get_submodule(name).parameters()) for name, count in calls.items()):
        return None
    try:
        return cast(fx.GraphModule, fuse(traced, inplace=True, no_trace=True))
    except (KeyError, AttributeError, RuntimeError, TypeError):
        return None


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in evaluation mode whose weights need no gradient, batch norms folded where that is exact.

    A model that torch.fx cannot trace is copied as it is.
    """
    try:
        network: nn.Module = fold_batch_norms(trace(model)) or copied(model)
    except UserError:
        network = copied(model)
    return network.eval().requires_grad_(False)
