"""The German Traffic Sign Recognition Benchmark, in the layout in which torchvision downloads it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import torch

from marginclip.data.folder import cached_images, image_file
from marginclip.data.images import ImageSet, Splits
from marginclip.data.sources import ImageSource, download_once, require_complete
from marginclip.errors import require
from marginclip.identity import Identifies

SPEED_LIMITS = tuple(f"speed limit {limit}" for limit in (20, 30, 50, 60, 70, 80))
SIGNS = (
    *SPEED_LIMITS, "end of speed limit 80", "speed limit 100", "speed limit 120", "no overtaking", "no overtaking for lorries",
    "right of way at the next crossing", "priority road", "give way", "stop", "no vehicles", "no lorries", "no entry", "danger",
    "bend to the left", "bend to the right", "double bend", "uneven road", "slippery road", "road narrows", "road works",
    "traffic lights", "pedestrians", "children", "bicycles", "snow", "animals", "end of all limits", "turn right ahead",
    "turn left ahead", "straight on", "straight on or right", "straight on or left", "keep right", "keep left", "roundabout",
    "end of no overtaking", "end of no overtaking for lorries",
)  # fmt: skip


class Gtsrb(ImageSource):
    """43 traffic signs (Stallkamp et al. 2012), downloaded into ``root/gtsrb`` by torchvision when they are not there.

    Images have sizes from 15 to 250 pixels. Classes are uneven. About 30 neighbouring training images show one sign from
    different distances, so the benchmark's own test split is held out.

    Args:
        root: the folder that holds ``gtsrb``.
        size: side in pixels, at least 8; the short side is scaled to it and the centre cut out.
        download: whether what is not there may be downloaded.
        cache: folder in which decoded images are kept. None: they are decoded anew every time.

    Raises:
        UserError: for a ``size`` under 8.
    """

    NUM_IMAGES = (26_640, 12_630)  # of training and test, as torchvision downloads them

    def __init__(
        self,
        *,
        root: str = "data",
        size: int = 32,
        download: Annotated[bool, Identifies.NOTHING] = True,
        cache: Annotated[str | None, Identifies.NOTHING] = None,
    ) -> None:
        require(size >= 8, f"dataset.size must be at least 8 pixels, got {size}")
        self.root, self.size, self.download = Path(root), size, download
        self.cache = None if cache is None else Path(cache)

    def load(self) -> Splits:
        """Training and test images, uint8 (N, 3, size, size).

        Raises :class:`UserError` when they are neither there nor can be downloaded, or are not all there.
        """
        training, test = download_once(self._files, title="GTSRB", root=self.root, folder="gtsrb/GTSRB", download=self.download)
        return Splits(self._read(training, self.NUM_IMAGES[0]), self._read(test, self.NUM_IMAGES[1]))

    def _files(self, download: bool) -> tuple[dict[Path, int], dict[Path, int]]:
        """The class of every training and every test image by its file."""
        from torchvision.datasets import GTSRB

        for split in ("train", "test"):
            GTSRB(self.root, split=split, download=download)  # raises RuntimeError where the split is not there
        base = self.root / "gtsrb"
        training = {path: int(path.parent.name) for path in sorted((base / "GTSRB" / "Training").glob("*/*.ppm"))}
        with open(base / "GT-final_test.csv", newline="") as listing:
            rows = [(row["Filename"], int(row["ClassId"])) for row in csv.DictReader(listing, delimiter=";")]
        test = {base / "GTSRB" / "Final_Test" / "Images" / name: label for name, label in rows}
        return training, {path: label for path, label in test.items() if path.exists()}

    def _read(self, labels: dict[Path, int], expected: int) -> ImageSet:
        require_complete(self.root / "gtsrb", len(labels), expected)
        files = [image_file(path) for path in labels]
        images = cached_images(self.root, files, self.size, strict=False, grey=False, cache=self.cache)
        return ImageSet(images, torch.tensor(list(labels.values())), SIGNS)
