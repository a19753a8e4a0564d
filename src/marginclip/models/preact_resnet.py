"""The pre-activation ResNet for small images, as the field's benchmarks use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.models.activations import make_activation
from marginclip.models.checks import check_stages
from marginclip.models.normalize import make_normalize


class PreActBlock(nn.Module):
    """Batch norm and activation before each of two 3 x 3 convolutions; the shortcut starts behind the first activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, activation: str, negative_slope: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = make_activation(activation, negative_slope=negative_slope)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = make_activation(activation, negative_slope=negative_slope)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = self.conv2(self.act2(self.bn2(self.conv1(activated))))
        return out + kept


class PreActResNet(nn.Module):
    """Pre-activation residual network (He et al. 2016): a 3 x 3 stem and one stage for each entry of ``blocks``.

    Takes images (N, in_channels, H, W) in [0, 1] of any H, W from 8 up and returns logits (N, num_classes). The default is the
    PreActResNet-18 of WaNet's code and of the public backdoor benchmarks: without the batch norm and activation behind the
    last block that He et al. have, and with parameter names as theirs (``conv1``, ``layer1.0.bn1``, ``layer2.0.shortcut.0``, ``linear``).

    Args:
        num_classes: how many logits it gives, at least 2.
        in_channels: channels of the images.
        blocks: residual blocks of each stage, from 1 up; stages after the first halve the image.
        width: channels of the stem and of the first stage; each further one has twice as many.
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
        activation: str = "relu",
        negative_slope: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_stages(num_classes, blocks, width)
        self.normalize = make_normalize(in_channels, mean, std)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.num_stages = len(blocks)
        kind = {"activation": activation, "negative_slope": negative_slope}
        channels = width
        for stage, count in enumerate(blocks):
            out_channels, first_stride = width * 2**stage, 2 if stage > 0 else 1
            layers = [PreActBlock(channels, out_channels, first_stride, **kind)]  # type: ignore[arg-type]
            layers += [PreActBlock(out_channels, out_channels, 1, **kind) for _ in range(count - 1)]  # type: ignore[arg-type]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            channels = out_channels
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out = self.conv1(self.normalize(images))
        for stage in range(self.num_stages):
            out = getattr(self, f"layer{stage + 1}")(out)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
