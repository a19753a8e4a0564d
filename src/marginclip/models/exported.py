"""Exported programs (``.pt2``) as classifiers: a graph of operators, without the code of the network that it was made from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from marginclip.errors import UserError, first_line, require
from marginclip.models.imported import NormalizedNetwork
from marginclip.models.normalize import make_normalize
from marginclip.networks.exporting import plain_graph


def exported_model(
    num_classes: int,
    in_channels: int = 3,
    *,
    path: str | None = None,
    trust: bool = False,
    output: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The network in the file ``path`` that ``torch.export.save`` wrote, with its weights.

    **Loading such a file can run code from it**: torch unpickles it. So ``trust`` must say that this may be.

    Args:
        num_classes: has no effect: the program has its own number of classes, which a run compares with that of the data.
        in_channels: channels of the images.
        path: the file. None, the default, is refused.
        trust: whether code from the file may run; must be true.
        output: as in :func:`from_program`.
        mean: what is subtracted from each channel, (in_channels,) for images in [0, 1]. None: nothing.
        std: what each channel is divided by then, (in_channels,) and positive; given together with ``mean``. None: nothing.

    Returns:
        The network behind its normalisation.

    Raises:
        UserError: without ``trust``, for other files, for programs that are no classifiers of images, and for statistics that
            do not fit.
    """
    del num_classes  # the file's own, which the run compares with that of the data
    require(path is not None and Path(path).is_file(), f"model.path must be an exported program, a .pt2 file, got {path!r}")
    require(
        trust,
        f"model.path='{path}' is an exported program: torch unpickles it, which can run code from the file; model.trust=true allows that",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(str(path))
    except Exception as error:  # whatever torch raises for a file of another kind or version
        raise UserError(
            f"model.path='{path}' is no exported program of torch {torch.__version__} ({first_line(error)})"
        ) from error
    network = NormalizedNetwork(make_normalize(in_channels, mean, std), from_program(program, output=output))
    network.loaded_from = str(path)
    return network


def from_program(program: torch.export.ExportedProgram, *, output: str | None = None) -> fx.GraphModule:
    """The network of an exported program, which can be moved, copied and bounded like any other: images (N, C, H, W) to logits.

    Args:
        program: what ``torch.export.export`` makes of a network, or ``torch.export.load`` reads.
        output: attribute or key of what the program returns that holds the logits. None: it returns them alone.

    Returns:
        The network; it shares its weights with the program.

    Raises:
        UserError: for a program of several inputs, one without logits, and one that takes only as many images as it was
            exported with.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    network = plain_graph(module, output=output)
    images = next(node for node in module.graph.nodes if node.op == "placeholder").meta.get("val")
    if isinstance(images, Tensor) and all(isinstance(side, int) for side in images.shape):
        parameter = next(network.parameters(), images)
        _check_any_batch(network, torch.rand(3, *images.shape[1:], device=parameter.device, dtype=images.dtype))
    return network


@torch.no_grad()
def _check_any_batch(network: fx.GraphModule, images: Tensor) -> None:
    """Raise :class:`UserError` unless a program of a fixed number of images decides three together as it decides each alone."""
    try:
        alike = torch.allclose(network(images), torch.cat([network(image[None]) for image in images]), rtol=1e-3, atol=1e-4)
    except (RuntimeError, ValueError):
        alike = False
    require(
        alike,
        "the program was exported for a fixed number of images: export it with dynamic_shapes=({0: torch.export.Dim('batch')},) and "
        "an example of two images or more",
    )
