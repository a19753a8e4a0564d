"""Any folder of images with one sub-folder a class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from PIL import UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from marginclip.data.images import FileImages, ImageSet, ImageStore, Splits, pixels_of, read_images
from marginclip.data.sources import ImageSource, held_out_mask
from marginclip.errors import UserError, require
from marginclip.files import write_tensors
from marginclip.identity import Identifies
from marginclip.locks import locked

TRAIN_NAMES, HELD_OUT_NAMES = ("train", "training"), ("test", "val", "valid", "validation")


class ImageFolder(ImageSource):
    """Images in ``root/<class>/*``, or in ``root/train/<class>/*`` and ``root/test/<class>/*``.

    Hidden files are ignored.

    Args:
        root: the folder. None, the default, is refused.
        size: side in pixels that images are brought to, at least 8 (short side scaled, centre cut out). None takes the first
            image's size and asks all others to have it.
        grey: whether images are read with one channel instead of three.
        held_out_share: share of every class that is held out of a single folder, in (0, 1]; at least one image.
        split_seed: of the choice of what is held out of a single folder; it is not the run's seed.
        memory_gib: limit, in GiB, of the decoded images of a split that are kept in memory; each is counted with three
            channels. A larger split is decoded batch by batch.
        cache: folder in which the images that are kept in memory are kept on disk, too. None: they are decoded anew every time.

    Raises:
        UserError: for a missing folder and settings outside their range. :meth:`load` raises it for an empty folder, fewer than
            two classes, a class without images, and, all by name, for files that are no images or of another size.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        size: int | None = None,
        grey: bool = False,
        held_out_share: float = 0.3,
        split_seed: int = 0,
        memory_gib: Annotated[float, Identifies.NOTHING] = 4.0,
        cache: Annotated[str | None, Identifies.NOTHING] = None,
    ) -> None:
        if root is None:
            raise UserError("dataset=image_folder needs dataset.root, a folder with one sub-folder of images a class")
        require(Path(root).is_dir(), f"dataset.root='{root}' is not a folder")
        require(size is None or size >= 8, f"dataset.size must be at least 8 pixels, got {size}")
        require(0 < held_out_share <= 1, f"dataset.held_out_share must be in (0, 1], got {held_out_share:g}")
        self.root, self.size, self.held_out_share, self.split_seed = Path(root), size, held_out_share, split_seed
        self.grey = grey
        self.memory_bytes, self.cache = memory_gib * 2**30, None if cache is None else Path(cache)

    def load(self) -> Splits:
        """Train and held-out split, uint8 (N, 3, size, size), or (N, 1, size, size) when ``grey``."""
        folders = image_folders(self.root)
        if len(folders) == 2:
            train_dir, held_out_dir = folders
            train = self._read(train_dir)
            held_out = self._read(held_out_dir, train.images[torch.tensor([0])].shape[-1])
            if train.classes != held_out.classes:
                odd = sorted(set(train.classes) ^ set(held_out.classes))
                raise UserError(
                    f"'{train_dir}' and '{held_out_dir}' have different classes: {', '.join(odd)} in one of them only"
                )
            return Splits(train, held_out)
        whole = self._read(self.root)
        mask = held_out_mask(whole.labels, held_out_share=self.held_out_share, seed=self.split_seed)
        return Splits(_take(whole, ~mask), _take(whole, mask))

    def digest(self) -> str:
        """Changes with the names and sizes of the files (:func:`folder_digest`)."""
        return folder_digest(self.root)

    def _read(self, folder: Path, size: int | None = None) -> ImageSet:
        files, labels, classes = list_images(folder)
        size = size or self.size or _side_of(files[0].path)
        images: ImageStore
        if len(files) * 3 * size * size <= self.memory_bytes:
            images = cached_images(folder, files, size, strict=self.size is None, grey=self.grey, cache=self.cache)
        else:
            images = FileImages([file.path for file in files], size, strict=self.size is None, grey=self.grey)
        return ImageSet(images, labels, classes)


def _kept(file: Path) -> Tensor | None:
    """The images of the cache; None where the file is missing or damaged."""
    try:
        return load_file(file)["images"]
    except (FileNotFoundError, SafetensorError):
        return None


def image_folders(root: Path) -> list[Path]:
    """``root/train`` and ``root/test``, under these names or similar ones, where there are both, else ``root`` alone."""
    train, held_out = (
        next((root / name for name in names if (root / name).is_dir()), None) for names in (TRAIN_NAMES, HELD_OUT_NAMES)
    )
    return [root] if train is None or held_out is None else [train, held_out]


class ImageFile(NamedTuple):
    """One file of a folder of images: its size in bytes, and when it was last changed, in nanoseconds."""

    path: str
    size: int
    changed: int


def image_file(path: Path) -> ImageFile:
    """The file at ``path`` as it is on disk."""
    status = path.stat()
    return ImageFile(str(path), status.st_size, status.st_mtime_ns)


def list_images(folder: Path) -> tuple[list[ImageFile], Tensor, tuple[str, ...]]:
    """Files, labels (N,) and class names of ``folder/<class>/*``, sorted by name; hidden files are left out."""
    class_dirs = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not class_dirs:
        raise UserError(f"dataset folder '{folder}' is empty: it needs one sub-folder of images a class")
    require(
        len(class_dirs) >= 2,
        f"dataset folder '{folder}' has one class only ('{class_dirs[0].name}'); a classifier needs at least two",
    )
    files: list[ImageFile] = []
    labels: list[int] = []
    for label, class_dir in enumerate(class_dirs):
        circle = class_dir.is_symlink() and folder.resolve().is_relative_to(class_dir.resolve())
        require(not circle, f"'{class_dir}' is a link to a folder that it lies in")
        found = sorted(_files(str(class_dir)), key=lambda file: file.path.split(os.sep))
        require(len(found) > 0, f"class '{class_dir.name}' has no images in '{class_dir}'")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels), tuple(path.name for path in class_dirs)


def cached_images(folder: Path, files: list[ImageFile], size: int, *, strict: bool, grey: bool, cache: Path | None) -> Tensor:
    """The decoded ``files`` of ``folder`` as :func:`read_images` gives them, kept in the folder ``cache`` where there is one."""
    paths = [file.path for file in files]
    if cache is None:
        return read_images(paths, size, strict=strict, grey=grey)
    listing = "\n".join(f"{file.path} {file.size} {file.changed}" for file in files)
    key = hashlib.sha256(os.fsencode(f"{folder.resolve()} {size} {strict} {grey} upright\n{listing}")).hexdigest()[:16]
    file = cache / f"images-{key}.safetensors"
    if (images := _kept(file)) is not None:
        return images
    with locked(cache):  # the runs of a sweep decode the same images once
        if (images := _kept(file)) is None:
            images = read_images(paths, size, strict=strict, grey=grey)
            write_tensors(file, {"images": images})
    return images


def folder_digest(root: Path) -> str:
    """Ten hexadecimal digits that change when an image of ``root`` is added, removed, renamed or changes its size.

    Raises :class:`UserError` as :func:`list_images` does.
    """
    root = root.absolute()
    files = [file for folder in image_folders(root) for file in list_images(folder)[0]]
    start = len(os.path.join(root, ""))
    listing = "\n".join(f"{file.path[start:].replace(os.sep, '/')} {file.size}" for file in files)
    return hashlib.sha256(os.fsencode(listing)).hexdigest()[:10]


def _files(folder: str) -> Iterator[ImageFile]:
    """All files below ``folder``; neither hidden ones nor those in hidden folders. One look at each: folders can be large."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(entry.path)
                elif entry.is_file():
                    status = entry.stat()
                    yield ImageFile(entry.path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"dataset folder '{folder}' cannot be read: {error.strerror}") from error


def _side_of(path: str) -> int:
    try:
        width, height = pixels_of(path)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"'{path}' is not a readable image") from error
    require(
        width == height, f"'{path}' is {width} x {height} pixels, not square: set dataset.size to the side to scale images to"
    )
    return width


def _take(images: ImageSet, mask: Tensor) -> ImageSet:
    from marginclip.data.batches import Subset

    return ImageSet(Subset(images.images, mask.nonzero().flatten()), images.labels[mask], images.classes)
