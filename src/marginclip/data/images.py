"""Labelled images: in memory as one uint8 tensor where they fit, decoded batch by batch where they do not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class ImageStore(Protocol):
    """What holds images: indexing with an int64 tensor (B,) gives uint8 images (B, C, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels (N,) int64 and the names of all classes."""

    images: ImageStore
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """A data set's two parts; the clean set and the evaluation set are drawn from ``held_out`` and never from ``train``."""

    train: ImageSet
    held_out: ImageSet

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.held_out.images[torch.tensor([0])].shape[1:]
        return channels, height, width


def decode(path: Path, size: int | None) -> Tensor:
    """One RGB image file as uint8 (3, H, W): the short side scaled to ``size`` and the centre cut out; None leaves it as it is."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if size is not None and image.size != (size, size):
        scale = size / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BILINEAR)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class FileImages:
    """Images decoded from their files whenever they are asked for, by a pool of threads (decoding releases the GIL)."""

    def __init__(self, paths: list[Path], size: int, *, num_threads: int = 4) -> None:
        self.paths, self.size, self.num_threads = paths, size, num_threads

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        with ThreadPoolExecutor(self.num_threads) as pool:
            return torch.stack(list(pool.map(lambda i: decode(self.paths[i], self.size), index.tolist())))
