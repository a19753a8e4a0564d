"""Labelled images: in memory as one uint8 tensor where they fit, decoded batch by batch where they do not."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from marginclip.errors import UserError, require

LARGEST = 64 * 2**20  # pixels of an image file
UPRIGHT, ON_ITS_SIDE = 1, 5  # EXIF orientations; from the second up width and height change places


class ImageStore(Protocol):
    """What holds images: indexing with an int64 tensor (B,) gives uint8 images (B, C, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels and the names of all classes.

    Args:
        images: the images: indexing with an int64 tensor (B,) gives uint8 (B, C, H, W).
        labels: their classes (N,), int64 in [0, K).
        classes: the names of all K classes.
    """

    images: ImageStore
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """A data set's two parts.

    Args:
        train: what victims are trained on.
        held_out: what the clean set and the evaluation set are drawn from; they are never drawn from ``train``.
    """

    train: ImageSet
    held_out: ImageSet

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.held_out.images[torch.tensor([0])].shape[1:]
        return channels, height, width


def pixels_of(path: str | Path) -> tuple[int, int]:
    """Width and height, upright, that an image file claims; no pixel is decoded.

    Raises :class:`UserError` for more than ``LARGEST`` pixels, and for what is no regular file, such as a pipe, that would never end.
    """
    status = os.stat(path)
    require(stat.S_ISREG(status.st_mode), f"'{path}' is not a regular file")
    try:
        with Image.open(path) as image:
            width, height = image.size if _orientation(image) < ON_ITS_SIDE else image.size[::-1]
    except Image.DecompressionBombError as error:
        raise UserError(f"'{path}' has too many pixels ({error})") from error
    require(width * height <= LARGEST, f"'{path}' has {width} x {height} pixels, which are too many")
    return width, height


def decode(path: str | Path, size: int | None, *, grey: bool = False) -> Tensor:
    """One image file as uint8 (3, H, W), or (1, H, W) when ``grey``; see :func:`image_tensor`.

    Raises :class:`UserError` for pixels of 32 bits, whose range is unknown, and as :func:`pixels_of`.
    """
    pixels_of(path)
    with Image.open(path) as opened:
        check_depth(opened, f"'{path}'")
        return image_tensor(opened, size, grey=grey)


def check_depth(image: Image.Image, named: str) -> None:
    """Raise :class:`UserError` for an image with pixels of 32 bits, whose range is unknown."""
    fine = _is_wide(image) or image.mode not in ("I", "F")
    require(fine, f"{named} has 32-bit pixels of unknown range: save it with 8 or 16 bits")


def image_tensor(image: Image.Image, size: int | None, *, grey: bool = False) -> Tensor:
    """An opened image as uint8 (3, H, W), or (1, H, W) when ``grey``.

    The image is turned upright, as its EXIF orientation says. Then the short side is scaled to ``size`` and the centre cut out; None
    leaves it as it is. 16-bit grey values are scaled to 8 bits.
    """
    kind, wide = "L" if grey else "RGB", _is_wide(image)
    if _orientation(image) != UPRIGHT:
        image = ImageOps.exif_transpose(image)
    if wide:
        image = Image.fromarray((np.array(image) / 257).round().astype(np.uint8))
    image = image.convert(kind)
    if size is not None and image.size != (size, size):
        scale = size / min(image.size)
        image = image.resize(
            (max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BILINEAR
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()


def _is_wide(image: Image.Image) -> bool:
    """Whether the pixels are grey values of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _orientation(image: Image.Image) -> int:
    """How a camera says that it was held, in [1, 8]; 1, upright, where nothing or nothing readable is said."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # whatever PIL meets in damaged EXIF data: the pixels may be fine
        return UPRIGHT
    return found if found in range(UPRIGHT, 9) else UPRIGHT


class FileImages:
    """Images decoded from their files whenever they are asked for (see :func:`read_images`)."""

    def __init__(self, paths: list[str], size: int, *, strict: bool = False, grey: bool = False) -> None:
        self.paths, self.size, self.strict, self.grey = paths, size, strict, grey

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        return read_images([self.paths[i] for i in index.tolist()], self.size, strict=self.strict, grey=self.grey)


def read_images(paths: list[str], size: int, *, strict: bool, grey: bool = False) -> Tensor:
    """All files decoded, uint8 (N, 3, size, size) or (N, 1, size, size) when ``grey``, by a pool of threads (decoding releases the GIL).

    ``strict`` refuses images of another size instead of scaling them. Raises :class:`UserError` that names what cannot be used.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = list(pool.map(lambda path: _try_decode(path, size, strict, grey), paths))
    faults = [result for result in results if isinstance(result, str)]
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise UserError(f"{len(faults)} of {len(paths)} files cannot be used: {shown}")
    return torch.stack([result for result in results if isinstance(result, Tensor)])


def _try_decode(path: str, size: int, strict: bool, grey: bool) -> Tensor | str:
    try:
        width, height = pixels_of(path)
        if strict and (width, height) != (size, size):
            return f"'{path}' is {width} x {height} pixels, not {size} x {size} (set dataset.size to scale images)"
        return decode(path, None if strict else size, grey=grey)
    except UserError as error:
        return str(error)
    except UnidentifiedImageError:
        return f"'{path}' is not an image"
    except (OSError, SyntaxError, ValueError) as error:
        return f"'{path}' is corrupt ({error})"
