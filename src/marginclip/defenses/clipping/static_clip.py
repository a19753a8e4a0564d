"""Static clipping: bounds at a fixed share of each map's clean maximum, nothing learned. The honest control for MMAC."""

from __future__ import annotations

from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses.base import ComputedDefense, RepairResult
from marginclip.defenses.clipping.settings import BoundStart
from marginclip.networks.layout import channels_last
from marginclip.networks.logits import check_clean_set, clean_logits


class StaticClip(ComputedDefense):
    """Every bound at ``start``, by default half of what its feature map reaches on the clean set.

    Args:
        start: where the bounds are. None: half of the clean maxima.
        channel_axis: where the channels of activations with more than two axes are. None: found by the model's layers.
        seed: has no effect: nothing is drawn.
    """

    label = "static clip"
    bounds_activations = True

    def __init__(self, *, start: BoundStart | None = None, channel_axis: int | None = None, seed: int = 0) -> None:
        del seed  # nothing is random
        self.start, self.channel_axis = start or BoundStart(share=0.5, quantile=1.0), channel_axis

    def compute(self, model: nn.Module, images: Tensor, labels: Tensor) -> RepairResult:
        """Bound a copy of the model and set its bounds."""
        check_clean_set(images, labels, clean_logits(model, images[:2]).shape[1])
        bounded = channels_last(BoundedNetwork(model, images[:1], channel_axis=self.channel_axis))
        self.start.apply(bounded, images, labels)
        return RepairResult(bounded)
