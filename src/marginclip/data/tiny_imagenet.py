"""Tiny ImageNet: 200 classes of ImageNet at 64 x 64 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch

from marginclip.data.folder import cached_images, image_file
from marginclip.data.images import ImageSet, Splits
from marginclip.data.sources import ImageSource, download_once, require_complete
from marginclip.identity import Identifies

Labelled = list[tuple[Path, str]]


class TinyImageNet(ImageSource):
    """Tiny ImageNet (Stanford CS231n), downloaded into ``root/tiny-imagenet-200`` with a checksum when it is not there.

    The 10,000 images of ``val/``, whose classes stand in ``val/val_annotations.txt``, are held out; those of ``test/`` have no labels.
    Grey images are given three channels.

    Args:
        root: the folder that holds ``tiny-imagenet-200``.
        download: whether what is not there may be downloaded.
        cache: folder in which decoded images are kept. None: they are decoded anew every time.
    """

    URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
    NUM_IMAGES = (100_000, 10_000)
    SIZE = 64

    def __init__(
        self,
        *,
        root: str = "data",
        download: Annotated[bool, Identifies.NOTHING] = True,
        cache: Annotated[str | None, Identifies.NOTHING] = None,
    ) -> None:
        self.root, self.download = Path(root), download
        self.cache = None if cache is None else Path(cache)

    @property
    def folder(self) -> Path:
        """Where the images are."""
        return self.root / "tiny-imagenet-200"

    def load(self) -> Splits:
        """Training and validation images, uint8 (N, 3, 64, 64).

        Raises :class:`UserError` when they are neither there nor can be downloaded, or are not all there.
        """
        training, validation = download_once(
            self._files, title="Tiny ImageNet", root=self.root, folder=self.folder.name, download=self.download
        )
        identifiers = sorted({name for _, name in training})
        classes = self._class_names(identifiers)
        parts = zip((training, validation), self.NUM_IMAGES, strict=True)
        return Splits(*(self._read(part, expected, identifiers, classes) for part, expected in parts))

    def _files(self, download: bool) -> tuple[Labelled, Labelled]:
        """The training and the validation images, each with the WordNet identifier of its class."""
        if download:
            from torchvision.datasets.utils import download_and_extract_archive

            download_and_extract_archive(self.URL, str(self.root), md5=self.MD5)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no '{self.folder}'")
        training = [(path, path.parent.parent.name) for path in sorted(self.folder.glob("train/*/images/*.JPEG"))]
        annotations = (self.folder / "val" / "val_annotations.txt").read_text().splitlines()
        listed = [line.split("\t")[:2] for line in annotations]
        validation = [(self.folder / "val" / "images" / name, identifier) for name, identifier in listed]
        return training, [(path, identifier) for path, identifier in validation if path.exists()]

    def _class_names(self, identifiers: list[str]) -> tuple[str, ...]:
        """The first English word for each class; with the identifier where two classes share it."""
        lines = [line.split("\t") for line in (self.folder / "words.txt").read_text().splitlines()]
        words = {identifier: meaning.split(",")[0] for identifier, meaning in lines}
        names = [words[identifier] for identifier in identifiers]
        pairs = zip(names, identifiers, strict=True)
        return tuple(name if names.count(name) == 1 else f"{name} ({identifier})" for name, identifier in pairs)

    def _read(self, labelled: Labelled, expected: int, identifiers: list[str], classes: tuple[str, ...]) -> ImageSet:
        require_complete(self.folder, len(labelled), expected)
        place = {identifier: label for label, identifier in enumerate(identifiers)}
        files = [image_file(path) for path, _ in labelled]
        images = cached_images(self.folder, files, self.SIZE, strict=False, grey=False, cache=self.cache)
        return ImageSet(images, torch.tensor([place[identifier] for _, identifier in labelled]), classes)
