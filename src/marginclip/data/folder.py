"""Any folder of images with one sub-folder a class."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from marginclip.data.images import FileImages, ImageSet, ImageStore, Splits, read_images
from marginclip.data.sources import held_out_mask
from marginclip.errors import UserError, require
from marginclip.files import write_tensors

TRAIN_NAMES, HELD_OUT_NAMES = ("train", "training"), ("test", "val", "valid", "validation")


class ImageFolder:
    """Images in ``root/<class>/*``, or in ``root/train/<class>/*`` and ``root/test/<class>/*``.

    A single folder is split by ``split_seed``, ``held_out_share`` of every class held out. ``size`` is the side in pixels that
    images are brought to (short side scaled, centre cut out); None takes the first image's size and asks all others to have
    it. ``grey`` reads one channel instead of three. Up to ``memory_gib`` of decoded images are kept in memory, and cached on
    disk in ``cache`` when that names a folder; beyond it images are decoded batch by batch. Hidden files are ignored.

    Raises :class:`UserError` for a missing or empty folder, fewer than two classes, a class without images, and, all by name,
    for files that are no images or of another size.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        size: int | None = None,
        grey: bool = False,
        held_out_share: float = 0.3,
        split_seed: int = 0,
        memory_gib: float = 4.0,
        cache: str | None = None,
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
        """Train and held-out split, uint8 (N, 3, size, size)."""
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

    def _read(self, folder: Path, size: int | None = None) -> ImageSet:
        paths, labels, classes = list_images(folder)
        size = size or self.size or _side_of(paths[0])
        images: ImageStore
        if len(paths) * 3 * size * size <= self.memory_bytes:
            images = self._cached(folder, paths, size)
        else:
            images = FileImages(paths, size, strict=self.size is None, grey=self.grey)
        return ImageSet(images, labels, classes)

    def _cached(self, folder: Path, paths: list[Path], size: int) -> Tensor:
        if self.cache is None:
            return read_images(paths, size, strict=self.size is None, grey=self.grey)
        listing = "\n".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)
        key = hashlib.sha256(f"{folder.resolve()} {size} {self.size is None} {self.grey}\n{listing}".encode()).hexdigest()[:16]
        file = self.cache / f"images-{key}.safetensors"
        if file.exists():
            try:
                return load_file(file)["images"]
            except SafetensorError:
                file.unlink()
        images = read_images(paths, size, strict=self.size is None, grey=self.grey)
        write_tensors(file, {"images": images})
        return images


def image_folders(root: Path) -> list[Path]:
    """``root/train`` and ``root/test``, under these names or similar ones, where there are both, else ``root`` alone."""
    train, held_out = (
        next((root / name for name in names if (root / name).is_dir()), None) for names in (TRAIN_NAMES, HELD_OUT_NAMES)
    )
    return [root] if train is None or held_out is None else [train, held_out]


def list_images(folder: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """Files, labels (N,) and class names of ``folder/<class>/*``, sorted by name; hidden files are left out."""
    class_dirs = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not class_dirs:
        raise UserError(f"dataset folder '{folder}' is empty: it needs one sub-folder of images a class")
    require(
        len(class_dirs) >= 2,
        f"dataset folder '{folder}' has one class only ('{class_dirs[0].name}'); a classifier needs at least two",
    )
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_dir in enumerate(class_dirs):
        files = sorted(path for path in class_dir.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(class_dir)))
        require(len(files) > 0, f"class '{class_dir.name}' has no images in '{class_dir}'")
        paths += files
        labels += [label] * len(files)
    return paths, torch.tensor(labels), tuple(path.name for path in class_dirs)


def folder_digest(root: Path) -> str:
    """Ten hexadecimal digits that change when an image of ``root`` is added, removed, renamed or changes its size.

    Raises :class:`UserError` as :func:`list_images` does.
    """
    paths = [path for folder in image_folders(root) for path in list_images(folder)[0]]
    listing = "\n".join(f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in paths)
    return hashlib.sha256(listing.encode()).hexdigest()[:10]


def _side_of(path: Path) -> int:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"'{path}' is not a readable image") from error
    require(
        width == height, f"'{path}' is {width} x {height} pixels, not square: set dataset.size to the side to scale images to"
    )
    return width


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _take(images: ImageSet, mask: Tensor) -> ImageSet:
    from marginclip.data.batches import Subset

    return ImageSet(Subset(images.images, mask.nonzero().flatten()), images.labels[mask], images.classes)
