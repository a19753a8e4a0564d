"""Deciding about any number of image files, one row each, with a repaired model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from marginclip.data.images import decode, pixels_of
from marginclip.errors import UserError, require
from marginclip.service.artefact import Artefact

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class LeftOut(NamedTuple):
    """A file below a folder that is not read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ScannedImage:
    """One image: what the model decides, what the detector makes of it (None: rejected), its p-value, and whether it is flagged.

    ``statistic`` is what the p-value is of. Where the file could not be used, ``error`` says why and the rest is None.
    """

    path: str
    decision: str | None = None
    corrected: str | None = None
    p_value: float | None = None
    statistic: float | None = None
    flagged: bool | None = None
    error: str | None = None


def scan(
    artefact: Artefact, paths: Iterable[str | Path | LeftOut], *, batch_size: int = 64, resize: bool = False
) -> Iterator[ScannedImage]:
    """A row for each image file, in order, as they come: a batch at a time is in memory, however many there are.

    Args:
        artefact: the repaired model with its detector.
        paths: of the files. What cannot be used is a row with its reason.
        batch_size: files in a batch.
        resize: scale and cut images of other sizes; otherwise they are rows with an error.

    Returns:
        The rows, one after the other.

    Raises:
        UserError: for a model of other than 1 or 3 channels, and for ``resize`` with a model of images that are not square.
    """
    require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    channels, height, width = artefact.image_shape
    require(
        channels in (1, 3),
        f"scan reads grey images and colour images, and this model takes {channels} channels: call the artefact with tensors instead",
    )
    require(not resize or height == width, f"resize needs a model of square images, this one takes {width} x {height}")
    device = next((parameter.device for parameter in artefact.model.parameters()), torch.device("cpu"))
    remaining = iter(paths)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        while batch := list(islice(remaining, batch_size)):
            read = list(pool.map(lambda path: _read(path, (channels, height, width), resize=resize), batch))
            names = [path.path if isinstance(path, LeftOut) else str(path) for path in batch]
            yield from _rows(artefact, names, read, device)


def image_files(inputs: Iterable[str | Path]) -> Iterator[str | LeftOut]:
    """Files named in ``inputs``, and image files below folders named there, found as they are asked for.

    One entry of a folder is held at a time, however many there are. Hidden files are passed over; links that lead out of their folder are
    named as left out. Raises :class:`UserError` for a folder that cannot be read.
    """
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            yield from _below(path, path.resolve())
        else:
            yield str(given)


def _below(folder: Path, root: Path) -> Iterator[str | LeftOut]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and not _leads_into(entry.path, root):
                    if os.path.isdir(entry.path) or entry.name.lower().endswith(SUFFIXES):
                        yield LeftOut(entry.path, "a link that leads out of the folder")
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _below(Path(entry.path), root)
                elif entry.name.lower().endswith(SUFFIXES):
                    yield entry.path
    except OSError as error:
        raise UserError(f"the folder '{folder}' cannot be read: {error.strerror}") from error


def _leads_into(link: str, root: Path) -> bool:
    try:
        return Path(link).resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a ring of links
        return False


def _read(path: str | Path | LeftOut, shape: tuple[int, int, int], *, resize: bool) -> Tensor | str:
    """The image (C, H, W) in uint8, or why it cannot be used."""
    channels, height, width = shape
    if isinstance(path, LeftOut):
        return path.reason
    try:
        across, down = pixels_of(path)
        if not resize and (across, down) != (width, height):
            return f"{across} x {down} pixels, the model takes {width} x {height}; --resize scales images"
        return decode(path, height if resize else None, grey=channels == 1)
    except UserError as error:
        return str(error).removeprefix(f"'{path}' ")
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # whatever a decoder raises on a hostile file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"not a readable image ({reason})"


def _rows(artefact: Artefact, paths: list[str], read: list[Tensor | str], device: torch.device) -> Iterator[ScannedImage]:
    images = [image for image in read if isinstance(image, Tensor)]
    detection, original = None, None
    if images:
        logits, bounded = artefact.logits(torch.stack(images).to(device).float() / 255)
        detection, original = artefact.detector.decide(logits, bounded), logits.argmax(1).tolist()
    number = 0
    for path, image in zip(paths, read, strict=True):
        if isinstance(image, str) or detection is None or original is None:
            yield ScannedImage(path, error=str(image))
            continue
        corrected = int(detection.decisions[number])
        yield ScannedImage(
            path, artefact.classes[original[number]], None if corrected < 0 else artefact.classes[corrected],
            float(detection.p_values[number]), float(detection.statistic[number]), bool(detection.flagged[number]),
        )  # fmt: skip
        number += 1
