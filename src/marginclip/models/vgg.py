"""VGG with batch norm for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.models.activations import make_activation
from marginclip.models.checks import check_stages
from marginclip.models.normalize import make_normalize


class VGG(nn.Module):
    """Plain 3 x 3 convolutions in stages, with batch norm, and one linear layer (Simonyan and Zisserman 2015, for small images).

    Takes images (N, in_channels, H, W) in [0, 1] and returns logits (N, num_classes). The default is VGG-19.

    Args:
        num_classes: how many logits it gives, at least 2.
        in_channels: channels of the images.
        blocks: convolutions of each stage, from 1 up; a stage ends with a halving of the image. ``(2, 2, 4, 4, 4)`` is VGG-19.
        width: channels of the first stage, 64 for VGG-19; each further one has twice as many, up to 8 ``width``.
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
        blocks: Sequence[int] = (2, 2, 4, 4, 4),
        width: int = 64,
        activation: str = "relu",
        negative_slope: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_stages(num_classes, blocks, width)
        self.normalize = make_normalize(in_channels, mean, std)
        layers = list[nn.Module]()
        channels = in_channels
        for stage, count in enumerate(blocks):
            out_channels = width * min(2**stage, 8)
            for _ in range(count):
                convolution = nn.Conv2d(channels, out_channels, 3, padding=1)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                layers += [
                    convolution,
                    nn.BatchNorm2d(out_channels),
                    make_activation(activation, negative_slope=negative_slope),
                ]
                channels = out_channels
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # the same for even sides; others lose no pixel
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(self.normalize(images))
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits
