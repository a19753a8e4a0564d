"""Imbalanced training sets: long-tailed (exponential) and step profiles (Cui et al. 2019; Cao et al. 2019)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from marginclip.data.batches import Subset
from marginclip.data.images import ImageSet, Splits
from marginclip.errors import require

PROFILES = ("exponential", "step")


def class_counts(profile: str, num_classes: int, largest: int, ratio: float) -> list[int]:
    """Images of every class, the first ones the most: ``largest`` down to ``largest / ratio``, truncated to whole images.

    ``exponential`` (LT): largest * ratio^(-i / (K - 1)) for class i of K; ``step``: the first half of the classes keep
    ``largest`` (of an odd number of classes, the smaller half), the others have ``largest / ratio``. Never less than one image.

    CIFAR-10-LT of ratio 100, and the step profile of the same ratio for 4 classes:

    >>> class_counts("exponential", 10, 5000, 100)
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    >>> class_counts("step", 4, 5000, 100)
    [5000, 5000, 50, 50]
    """
    if profile == "step":
        return [largest if label < num_classes // 2 else _whole(largest / ratio) for label in range(num_classes)]
    # A power of the whole exponent: a power of the class-to-class factor loses an image to rounding (CIFAR-100, ratio 10).
    return [_whole(largest * ratio ** (-label / (num_classes - 1))) for label in range(num_classes)]


def _whole(count: float) -> int:
    """``count`` truncated, with room for rounding errors, and at least one."""
    return max(1, int(count + 1e-9))


class Imbalance:
    """Keeps, of every class, as many training images as its ``profile`` and ``ratio`` say.

    Classes stay in their order: the first is the most common one. A data set whose own classes differ in size is first taken to
    be as large as its smallest class. One generator shuffles every class in turn, and the first images stay, as in the code of
    LDAM-DRW. So a smaller subset lies in a larger one.

    Args:
        profile: ``exponential`` or ``step`` (see :func:`class_counts`).
        ratio: of the images of the largest class to those of the smallest, from 1 up.
        subset_seed: of the choice of the images that are kept, in [0, 2^32). The choice follows from it and the data set alone,
            not from the run's seed.

    Raises:
        UserError: for another profile, a ratio under 1 and a seed outside its range.
    """

    def __init__(self, *, profile: str = "exponential", ratio: float = 100, subset_seed: int = 0) -> None:
        require(profile in PROFILES, f"imbalance.profile must be one of {', '.join(PROFILES)}, got '{profile}'")
        require(1 <= ratio < float("inf"), f"imbalance.ratio must be a number from 1 up, got {ratio:g}")
        require(0 <= subset_seed < 2**32, f"imbalance.subset_seed must be in [0, 2^32), got {subset_seed}")
        self.profile, self.ratio, self.subset_seed = profile, ratio, subset_seed

    def choose(self, labels: Tensor, num_classes: int) -> Tensor:
        """Indices (M,) of the images kept, of those with ``labels`` (N,), class after class."""
        sizes = labels.bincount(minlength=num_classes)
        counts = class_counts(self.profile, num_classes, int(sizes.min()), self.ratio)
        random = np.random.RandomState(self.subset_seed)  # the legacy stream is the published choice of images
        kept = []
        for label, count in enumerate(counts):
            members = (labels == label).nonzero().flatten().numpy()
            random.shuffle(members)
            kept.append(torch.from_numpy(members[:count].copy()))
        return torch.cat(kept)

    def __call__(self, splits: Splits) -> Splits:
        """The same data with fewer training images; what is held out stays as it is."""
        train = splits.train
        index = self.choose(train.labels, len(train.classes))
        return Splits(ImageSet(Subset(train.images, index), train.labels[index], train.classes), splits.held_out)
