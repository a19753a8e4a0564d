"""The order of a network's weights and images in memory while it is trained."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)
FEW_CHANNELS = 8


def in_layout(images: Tensor, layout: torch.memory_format) -> Tensor:
    """``images`` (N, C, H, W) in ``layout``, also by their strides.

    Images of one channel are in both layouts at once; torch then goes by the strides, which ``contiguous`` leaves as they are.
    """
    if layout is torch.contiguous_format and images.stride() != _plain_strides(images):
        return images.clone(memory_format=torch.contiguous_format)
    return images.contiguous(memory_format=layout)


def channels_last(network: Network) -> Network:
    """``network`` with its weights and buffers of four axes channels-last, in place; those of other ranks have no such layout."""
    for value in (*network.parameters(), *network.buffers()):
        if value.dim() == 4:
            value.data = value.data.to(memory_format=torch.channels_last)
    return network


def lay_out_for_training(network: nn.Module) -> None:
    """Bring the weights of ``network`` into :func:`training_layout`, in place.

    Layers that corrupt memory bring their own input into it, too: other images than those of the data reach them in some trainings.
    """
    layout = training_layout(network)
    for layer in network.modules():
        if _corrupts_memory(layer) and contiguous_input not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(contiguous_input)
    for weight in network.parameters():
        if weight.dim() == 4:
            weight.data = in_layout(weight.data, layout)


def contiguous_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook in front of a layer: images in torch's own layout."""
    return tuple(in_layout(images, torch.contiguous_format) for images in inputs)


def _plain_strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(tensor.shape[axis + 1 :].numel()) for axis in range(tensor.dim()))


def training_layout(network: nn.Module) -> torch.memory_format:
    """Channels-last, which is the faster one, unless training ``network`` so could corrupt memory.

    On CPUs without AVX-512, torch 2.14.1 writes past a buffer in the backward pass of a 1 x 1 convolution of stride 2 with fewer than
    8 input channels, on channels-last images. The process then aborts ("double free or corruption"), at once or later::

        layer = torch.nn.Conv2d(4, 8, 1, stride=2, bias=False).to(memory_format=torch.channels_last)
        for _ in range(1000):
            images = torch.rand(128, 4, 16, 16).contiguous(memory_format=torch.channels_last)
            layer(images).sum().backward()

    The shortcuts of a ResNet of width 4 to 7 are such layers. Contiguous images are safe, and so are frozen weights.

    Ask for the layout where it is needed. A ``torch.memory_format`` kept in a module cannot be sent to another process.
    """
    return torch.contiguous_format if any(map(_corrupts_memory, network.modules())) else torch.channels_last


def _corrupts_memory(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels // layer.groups < FEW_CHANNELS
    )
