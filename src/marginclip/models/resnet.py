"""Residual networks for small images: the ResNet-18 with the CIFAR stem, ResNet-20/32, and the small default."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.errors import require
from marginclip.models.activations import make_activation
from marginclip.models.checks import check_stages
from marginclip.models.normalize import make_normalize


class PadShortcut(nn.Module):
    """Option-A shortcut (He et al. 2016): every second pixel, new channels filled with zeros; no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut; activation after the first and after the sum."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, shortcut: str, activation: str, negative_slope: float
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = make_activation(activation, negative_slope=negative_slope)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = make_activation(activation, negative_slope=negative_slope)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = (
                PadShortcut(in_channels, out_channels, stride)
                if shortcut == "pad"
                else nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        activated: Tensor = self.act2(out + self.shortcut(x))
        return activated


class ResNet(nn.Module):
    """Residual network with a 3 x 3 stem and one stage for each entry of ``blocks``; stages after the first halve the image.

    Takes images (N, in_channels, H, W) in [0, 1] of any H, W from 8 up and returns logits (N, num_classes).
    With ``blocks=(2, 2, 2, 2)``, ``width=64`` and ``shortcut="projection"`` it is the CIFAR ResNet-18 of the papers; with
    ``(5, 5, 5)``, 16 and ``"pad"`` ResNet-32. Parameter names follow the common CIFAR implementation (``conv1``, ``bn1``,
    ``layer1.0.conv1``, ``layer2.0.shortcut.0``, ``linear``).

    Args:
        num_classes: how many logits it gives, at least 2.
        in_channels: channels of the images.
        blocks: residual blocks of each stage, from 1 up.
        width: channels of the stem and of the first stage; each further one has twice as many.
        shortcut: what passes by a block that changes the size or the channels. ``projection``: a 1 x 1 convolution with batch
            norm; ``pad``: every second pixel, with zeros in the new channels, and no parameters.
        activation: ``relu``, ``leaky_relu``, ``elu``, ``gelu`` or ``silu``.
        negative_slope: of ``leaky_relu`` alone (paper 1, section 5.3 uses 0.1).
        mean: what is subtracted from each channel, (in_channels,) for images in [0, 1]. None: nothing, as in the papers.
        std: what each channel is divided by then, (in_channels,) and positive; given together with ``mean``. None: nothing.

    Raises:
        UserError: for fewer than 2 classes, ``blocks`` that are no list of counts, and other settings outside their range.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        shortcut: str = "projection",
        activation: str = "relu",
        negative_slope: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_stages(num_classes, blocks, width)
        require(shortcut in ("projection", "pad"), f"model.shortcut must be 'projection' or 'pad', got '{shortcut}'")
        self.normalize = make_normalize(in_channels, mean, std)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = make_activation(activation, negative_slope=negative_slope)
        self.num_stages = len(blocks)
        channels = width
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                out_channels = width * 2**stage
                layers.append(
                    BasicBlock(
                        channels, out_channels, stride, shortcut=shortcut, activation=activation, negative_slope=negative_slope
                    )
                )
                channels = out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(channels, num_classes)
        self.apply(_kaiming_init)

    def forward(self, images: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(self.normalize(images))))
        for stage in range(self.num_stages):
            out = getattr(self, f"layer{stage + 1}")(out)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _kaiming_init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
