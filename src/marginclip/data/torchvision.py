"""Any classification data set of torchvision by its name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from marginclip.data.decoded import decode_all, labelled
from marginclip.data.folder import HELD_OUT_NAMES
from marginclip.data.images import ImageSet, Splits
from marginclip.data.sources import ImageSource, download_once, seeded_split
from marginclip.errors import UserError, first_line, nearest, require
from marginclip.identity import Identifies, argument_types

log = logging.getLogger(__name__)
TRAINING_NAMES = ("train", "trainval", "train-standard")


class TorchvisionData(ImageSource):
    """A data set of ``torchvision.datasets`` whose images have one class each, such as SVHN, STL10 or EuroSAT.

    Its own training split is trained on; its test split, or else its validation split, is held out. All images are decoded into
    memory.

    Args:
        dataset: name of the data set's class. :meth:`load` refuses None, the default.
        root: the folder that holds the data, or that it is downloaded into.
        size: side in pixels that images are brought to, at least 8 (short side scaled, centre cut out). None asks for square
            images of one size.
        grey: whether images are read with one channel instead of three.
        arguments: further ones of the data set's class, by name. None: none.
        download: whether what is not there may be downloaded, where torchvision can do that.
        held_out_share: share of every class that is held out of a data set without splits, in (0, 1]; at least one image.
        split_seed: of the choice of what is held out of such a data set; it is not the run's seed.
        memory_gib: limit of the decoded images of a split, in GiB.

    Raises:
        UserError: for a ``size`` under 8. :meth:`load` raises it for an unknown name, labels that are not one class an image,
            and images that do not fit.
    """

    def __init__(
        self,
        *,
        dataset: str | None = None,
        root: str = "data",
        size: int | None = None,
        grey: bool = False,
        arguments: Mapping[str, Any] | None = None,
        download: Annotated[bool, Identifies.NOTHING] = True,
        held_out_share: float = 0.3,
        split_seed: int = 0,
        memory_gib: Annotated[float, Identifies.NOTHING] = 4.0,
    ) -> None:
        require(size is None or size >= 8, f"dataset.size must be at least 8 pixels, got {size}")
        self.dataset, self.root, self.size, self.grey, self.download = dataset, Path(root), size, grey, download
        self.arguments, self.held_out_share, self.split_seed = dict(arguments or {}), held_out_share, split_seed
        self.memory_bytes = memory_gib * 2**30

    def load(self) -> Splits:
        """Train and held-out split, uint8 (N, 3, size, size), or (N, 1, size, size) when ``grey``."""
        kind = self._kind()
        parts = download_once(
            lambda download: self._parts(kind, download),
            title=f"torchvision's {self.dataset}",
            root=self.root,
            folder="it",
            download=self.download,
        )
        decoded, classes = self._with_images([self._decode(part) for part in parts], self._classes(parts))
        if len(decoded) == 1:
            images, labels = decoded[0]
            return seeded_split(images, labels, classes, held_out_share=self.held_out_share, seed=self.split_seed)
        return Splits(*(ImageSet(images, labels, classes) for images, labels in decoded))

    def _kind(self) -> type[Any]:
        """The class of the data set."""
        import torchvision

        known = [name for name in torchvision.datasets.__all__ if name[0].isupper()]
        if self.dataset is None:
            raise UserError("dataset=torchvision needs dataset.dataset, such as dataset.dataset=SVHN")
        require(
            self.dataset in known,
            f"dataset.dataset='{self.dataset}' is not a data set of torchvision{nearest(self.dataset, known)}",
        )
        return getattr(torchvision.datasets, self.dataset)  # type: ignore[no-any-return]

    def _parts(self, kind: type[Any], download: bool) -> list[Any]:
        """The training and the held-out part, or the whole where the data set has no splits."""
        taken = argument_types(kind)
        offered = {"root": str(self.root), "download": download}
        settings = {name: value for name, value in offered.items() if name in taken} | self.arguments
        try:
            if "train" in taken and "train" not in self.arguments:
                return [kind(**settings, train=True), kind(**settings, train=False)]
            if "split" in taken and "split" not in self.arguments:
                names = TRAINING_NAMES, HELD_OUT_NAMES
                return [self._first_split(lambda split: kind(**settings, split=split), each) for each in names]
            return [kind(**settings)]
        except (TypeError, ValueError) as error:  # an argument that is missing, or a value that it does not take
            raise UserError(
                f"torchvision's {self.dataset} refuses its arguments ({first_line(error)}): give them as +dataset.arguments.NAME=VALUE"
            ) from error

    def _first_split(self, make: Callable[[str], Any], names: Sequence[str]) -> Any:
        """The split under the first of its usual ``names`` that the data set has; it refuses others by a ValueError."""
        for name in names:
            try:
                return make(name)
            except ValueError as error:
                reason = first_line(error)
        raise UserError(f"torchvision's {self.dataset} has no split {', '.join(names)} ({reason}); use dataset=image_folder")

    def _classes(self, parts: list[Any]) -> tuple[str, ...]:
        """The names that the data set has, or the numbers of its classes."""
        named = getattr(parts[0], "classes", None)
        if isinstance(named, (list, tuple)) and named:
            return tuple(str(name[0] if isinstance(name, tuple) else name) for name in named)
        return tuple(str(number) for number in range(1 + max(label for part in parts for label in _labels(part))))

    def _with_images(
        self, decoded: list[tuple[Tensor, Tensor]], classes: tuple[str, ...]
    ) -> tuple[list[tuple[Tensor, Tensor]], tuple[str, ...]]:
        """The parts and the classes without those that have no image, such as the first of EMNIST's letters."""
        kept = torch.cat([labels for _, labels in decoded]).unique()
        if len(kept) == len(classes):
            return decoded, classes
        empty = [name for number, name in enumerate(classes) if number not in kept]
        log.info(
            "torchvision's %s has no image of %s, which is left out of its classes", self.dataset, ", ".join(map(repr, empty))
        )
        return [(images, torch.searchsorted(kept, labels)) for images, labels in decoded], tuple(
            classes[i] for i in kept.tolist()
        )

    def _decode(self, part: Any) -> tuple[Tensor, Tensor]:
        title = f"torchvision's {self.dataset}"
        return decode_all(
            (labelled(part[index], title) for index in range(len(part))), count=len(part), size=self.size, grey=self.grey,
            memory_bytes=self.memory_bytes, title=title,
        )  # fmt: skip


def _labels(part: Any) -> Iterable[int]:
    """The classes of all images, without decoding these where the data set keeps them apart."""
    for name in ("labels", "targets", "_labels"):
        if hasattr(part, name):
            return [int(label) for label in getattr(part, name)]
    return [part[index][1] for index in range(len(part))]
