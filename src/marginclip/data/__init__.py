"""Data sources, the clean/evaluation split and the LightningDataModule."""

from marginclip.data.augment import Augment
from marginclip.data.clean import split_clean
from marginclip.data.folder import ImageFolder
from marginclip.data.gtsrb import Gtsrb
from marginclip.data.huggingface import HuggingFaceData
from marginclip.data.images import ImageSet, Splits
from marginclip.data.imbalance import Imbalance
from marginclip.data.module import ImageData
from marginclip.data.sources import Cifar10, Cifar100, Digits, ImageSource, MnistM, MnistSubset
from marginclip.data.tiny_imagenet import TinyImageNet
from marginclip.data.torchvision import TorchvisionData

__all__ = [
    "Augment",
    "Cifar10",
    "Cifar100",
    "Digits",
    "Gtsrb",
    "HuggingFaceData",
    "ImageData",
    "ImageFolder",
    "ImageSet",
    "ImageSource",
    "Imbalance",
    "MnistM",
    "MnistSubset",
    "Splits",
    "TinyImageNet",
    "TorchvisionData",
    "split_clean",
]
