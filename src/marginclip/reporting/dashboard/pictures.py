"""The images of a run on one sheet: examples of the trigger, and the most extreme images of its detector."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from marginclip.record import RunRecord
from marginclip.reporting.style import Arrays

COLUMNS = 12
LARGEST_SIDE = 96
GROUPS = {
    "caught": "Triggered images that were flagged, of the largest statistic",
    "missed": "Triggered images that were missed, of the smallest statistic",
    "false_alarms": "Clean images that were flagged, of the largest statistic",
}


@dataclass
class Sheet:
    """Tiles of one size in rows of ``COLUMNS``; ``groups`` are their titles with the caption and place of each tile."""

    tiles: list[np.ndarray]
    groups: list[dict[str, Any]]

    @property
    def height(self) -> int:
        """The height of a tile, in pixels."""
        return int(self.tiles[0].shape[0])

    @property
    def width(self) -> int:
        """The width of a tile, in pixels."""
        return int(self.tiles[0].shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet, in pixels."""
        return min(COLUMNS, len(self.tiles)) * self.width, -(-len(self.tiles) // COLUMNS) * self.height

    def place(self, number: int) -> tuple[int, int]:
        """The left and upper edge of a tile, in pixels."""
        return number % COLUMNS * self.width, number // COLUMNS * self.height

    def png(self) -> bytes:
        """The sheet as a PNG."""
        picture = Image.new("RGB", self.size)
        for number, tile in enumerate(self.tiles):
            picture.paste(Image.fromarray(tile), self.place(number))
        content = io.BytesIO()
        picture.save(content, "PNG", optimize=True)
        return content.getvalue()


def sheet(record: RunRecord, arrays: Arrays) -> Sheet | None:
    """The images that a run saved: ``examples/*`` and ``extremes/<row>/<group>/*``; None where it has none that can be shown."""
    found = Sheet([], [])
    _add_examples(found, record, arrays)
    for row in record.rows:
        for group, title in GROUPS.items():
            parts = {key: arrays.get(f"extremes/{row}/{group}/{key}") for key in ("images", "statistic", "labels")}
            if parts["images"] is None or parts["statistic"] is None or parts["labels"] is None:
                continue
            pairs = zip(parts["labels"], parts["statistic"], strict=True)
            captions = [(record.class_name(int(number)), f"{value:.3g}") for number, value in pairs]
            _add(found, title, parts["images"] / 255, captions)
    return found if found.tiles else None


def _add_examples(found: Sheet, record: RunRecord, arrays: Arrays) -> None:
    names = {key: arrays.get(f"examples/{key}") for key in ("clean", "triggered", "labels", "targets")}
    labels, targets = names["labels"], names["targets"]
    if names["clean"] is None or names["triggered"] is None or labels is None or targets is None:
        return
    _add(found, "Clean images", names["clean"], [(record.class_name(int(number)), "") for number in labels])
    _add(found, "The same, triggered", names["triggered"], [(f"→ {record.class_name(int(number))}", "") for number in targets])


def _add(found: Sheet, title: str, images: np.ndarray, captions: list[tuple[str, str]]) -> None:
    """Add images (n, C, H, W) in [0, 1], C 1 or 3; all tiles take the size of the first."""
    if not len(images) or images.shape[1] not in (1, 3):
        return
    size = (found.height, found.width) if found.tiles else _fitting(images.shape[2], images.shape[3])
    first = len(found.tiles)
    found.tiles += [_tile(image, size) for image in images]
    tiles = [
        {"name": name, "statistic": statistic, "number": first + number} for number, (name, statistic) in enumerate(captions)
    ]
    found.groups.append({"title": title, "tiles": tiles})


def _fitting(height: int, width: int) -> tuple[int, int]:
    factor = min(1.0, LARGEST_SIDE / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _tile(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (C, H, W) in [0, 1] as uint8 (*size, 3)."""
    content = np.broadcast_to((255 * np.clip(image, 0, 1)).round().astype(np.uint8).transpose(1, 2, 0), (*image.shape[1:], 3))
    if content.shape[:2] == size:
        return np.ascontiguousarray(content)
    return np.asarray(Image.fromarray(np.ascontiguousarray(content)).resize(size[::-1], Image.Resampling.BOX))
