"""A vision transformer for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import VisionTransformer

from marginclip.errors import require
from marginclip.models.normalize import make_normalize


class ViT(nn.Module):
    """Torchvision's vision transformer (Dosovitskiy et al. 2021) for images of ``image_size`` in patches of ``patch_size`` pixels.

    The default is ViT-Small (12 layers, 6 heads, 384 channels) on a 32-pixel image in 8 x 8 patches of 4 pixels. Takes images
    (N, in_channels, image_size, image_size) in [0, 1] and returns logits (N, num_classes).

    Args:
        num_classes: how many logits it gives, at least 2.
        in_channels: channels of the images.
        image_size: side of the images, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch, in pixels.
        layers: transformer layers.
        heads: attention heads of a layer.
        width: channels that stand for a patch; a multiple of ``heads``. The hidden layer of each MLP has 4 times as many.
        mean: what is subtracted from each channel, (in_channels,) for images in [0, 1]. None: nothing.
        std: what each channel is divided by then, (in_channels,) and positive; given together with ``mean``. None: nothing.

    Raises:
        UserError: for fewer than 2 classes, counts under 1, sizes that do not divide each other, and statistics that do not
            fit.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        image_size: int = 32,
        patch_size: int = 4,
        layers: int = 12,
        heads: int = 6,
        width: int = 384,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        require(num_classes >= 2, f"a classifier needs at least 2 classes, got {num_classes}")
        for key, value in (("patch_size", patch_size), ("layers", layers), ("heads", heads)):
            require(value >= 1, f"model.{key} must be at least 1, got {value}")
        require(
            image_size % patch_size == 0,
            f"model.image_size must be a multiple of model.patch_size, got {image_size} and {patch_size}",
        )
        require(width % heads == 0, f"model.width must be a multiple of model.heads, got {width} and {heads}")
        self.normalize = make_normalize(in_channels, mean, std)
        self.network = VisionTransformer(
            image_size=image_size, patch_size=patch_size, num_layers=layers, num_heads=heads, hidden_dim=width,
            mlp_dim=4 * width, num_classes=num_classes,
        )  # fmt: skip
        if in_channels != 3:
            self.network.conv_proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        nn.init.trunc_normal_(self.network.heads.head.weight, std=0.02)  # torchvision's zeros give every class the same logit

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits
