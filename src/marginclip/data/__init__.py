"""Data sources, the clean/evaluation split and the LightningDataModule."""

from marginclip.data.augment import Augment
from marginclip.data.clean import split_clean
from marginclip.data.folder import ImageFolder
from marginclip.data.images import ImageSet, Splits
from marginclip.data.imbalance import Imbalance
from marginclip.data.module import ImageData
from marginclip.data.sources import Cifar10, Cifar100, Digits, ImageSource, MnistM, MnistSubset

__all__ = [
    "Augment",
    "Cifar10",
    "Cifar100",
    "Digits",
    "ImageData",
    "ImageFolder",
    "ImageSet",
    "ImageSource",
    "Imbalance",
    "MnistM",
    "MnistSubset",
    "Splits",
    "split_clean",
]
