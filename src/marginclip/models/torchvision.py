"""Any torchvision classifier, with the normalisation put inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torchvision
from torch import Tensor, nn

from marginclip.errors import UserError, nearest, require
from marginclip.models.normalize import make_normalize


class TorchvisionModel(nn.Module):
    """A torchvision classification network by name, taking images in [0, 1] and giving logits (N, num_classes).

    Args:
        num_classes: how many logits it gives. With ``weights``, it must be the number of classes that these have.
        in_channels: channels of the images; must be 3.
        network: name of a classifier in ``torchvision.models``.
        weights: a name of torchvision's weights for it, such as ``DEFAULT``, which are downloaded. None: fresh weights.
        mean: what is subtracted from each channel, (3,) for images in [0, 1]. The default is ImageNet's. None: nothing.
        std: what each channel is divided by then, (3,) and positive; given together with ``mean``. None: nothing.

    Raises:
        UserError: for an unknown name, for images of other than 3 channels, and for statistics that do not fit.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        network: str = "resnet18",
        weights: str | None = None,
        mean: Sequence[float] | None = (0.485, 0.456, 0.406),
        std: Sequence[float] | None = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        known = torchvision.models.list_models(module=torchvision.models)
        if network not in known:
            raise UserError(f"model.network '{network}' is not a torchvision classifier{nearest(network, known)}")
        require(in_channels == 3, f"model=torchvision takes 3-channel images, the data set has {in_channels}")
        named = [] if weights is None else ["DEFAULT", *(each.name for each in torchvision.models.get_model_weights(network))]
        require(
            weights is None or str(weights).rpartition(".")[2] in named,
            f"model.weights must be null or one of {', '.join(named)} for model.network={network}, got '{weights}'",
        )
        if weights is not None:
            chosen = torchvision.models.get_model_weights(network)[str(weights).rpartition(".")[2]]
            given = len(chosen.meta["categories"])
            require(
                given == num_classes,
                f"model.weights={weights} has {given} classes, the data set {num_classes}: set model.weights=null, and give weights of "
                "your own with victim.path",
            )
        self.normalize = make_normalize(in_channels, mean, std)
        self.network: nn.Module = torchvision.models.get_model(network, weights=weights, num_classes=num_classes)

    def forward(self, images: Tensor) -> Tensor:
        found: Any = self.network(self.normalize(images))
        auxiliary = self.training and getattr(self.network, "aux_logits", False)  # of GoogLeNet and Inception
        logits: Tensor = found.logits if auxiliary else found
        return logits
