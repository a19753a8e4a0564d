"""Image data sets of the Hugging Face Hub, or in folders and files that its library reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from PIL import Image

from marginclip.data.decoded import Labelled, decode_all
from marginclip.data.folder import HELD_OUT_NAMES
from marginclip.data.images import ImageSet, Splits
from marginclip.data.sources import ImageSource, seeded_split
from marginclip.errors import UserError, first_line, require
from marginclip.identity import Identifies


class HuggingFaceData(ImageSource):
    """What ``datasets.load_dataset(path)`` gives; needs the package datasets.

    No code of a data set is run. All images are decoded into memory.

    Args:
        path: name on the Hub, or a local folder. :meth:`load` refuses None, the default.
        config: one of its configurations. None: its default.
        revision: a commit or tag of it. None: what the Hub has today.
        image: name of the column of images.
        label: name of the column of classes.
        train_split: name of the split that is trained on.
        held_out_split: name of the split that is held out. None: the first of ``test``, ``val``, ``valid`` and ``validation``
            that there is, or else ``held_out_share`` of every class.
        size: side in pixels that images are brought to, at least 8 (short side scaled, centre cut out). None asks for square
            images of one size.
        grey: whether images are read with one channel instead of three.
        streaming: whether images are decoded as they arrive, instead of storing the files first.
        held_out_share: share of every class that is held out where no split is, in (0, 1]; at least one image.
        split_seed: of the choice of what is held out then; it is not the run's seed.
        memory_gib: limit of the decoded images of a split, in GiB.

    Raises:
        UserError: for a ``size`` under 8. :meth:`load` raises it for what cannot be loaded or does not fit.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        image: str = "image",
        label: str = "label",
        train_split: str = "train",
        held_out_split: str | None = None,
        size: int | None = None,
        grey: bool = False,
        streaming: Annotated[bool, Identifies.NOTHING] = False,
        held_out_share: float = 0.3,
        split_seed: int = 0,
        memory_gib: Annotated[float, Identifies.NOTHING] = 4.0,
    ) -> None:
        require(size is None or size >= 8, f"dataset.size must be at least 8 pixels, got {size}")
        self.path, self.config, self.revision, self.streaming = path, config, revision, streaming
        self.image, self.label, self.size, self.grey = image, label, size, grey
        self.train_split, self.held_out_split = train_split, held_out_split
        self.held_out_share, self.split_seed = held_out_share, split_seed
        self.memory_bytes = memory_gib * 2**30

    def load(self) -> Splits:
        """Train and held-out split, uint8 (N, 3, size, size), or (N, 1, size, size) when ``grey``.

        Raises :class:`UserError` for what cannot be loaded, for splits and columns that are not there, and for images that do not fit.
        """
        parts = self._parts(self._loaded())
        classes = self._classes(parts)
        read = [
            decode_all(
                self._samples(part, classes), count=None if self.streaming else len(part), size=self.size, grey=self.grey,
                memory_bytes=self.memory_bytes, title=f"dataset.path='{self.path}'",
            )
            for part in parts
        ]  # fmt: skip
        if len(read) == 1:
            return seeded_split(*read[0], classes, held_out_share=self.held_out_share, seed=self.split_seed)
        return Splits(*(ImageSet(images, labels, classes) for images, labels in read))

    def digest(self) -> str | None:
        """Changes with the names and sizes of the files of a local folder; None for a data set of the Hub."""
        folder = Path(self.path or "")
        if not self.path or not folder.is_dir():
            return None
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listing = "\n".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in files)
        return hashlib.sha256(os.fsencode(listing)).hexdigest()[:10]

    def _loaded(self) -> Mapping[str, Any]:
        """All splits by name."""
        if self.path is None:
            raise UserError("dataset=huggingface needs dataset.path, a name on the Hub or a folder")
        try:
            import datasets
        except ImportError as error:
            raise UserError("dataset=huggingface needs the package datasets: pip install 'marginclip[huggingface]'") from error
        settings = {"revision": self.revision, "streaming": self.streaming}
        try:
            found: Mapping[str, Any] = datasets.load_dataset(self.path, self.config, **settings)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"dataset.path='{self.path}' cannot be loaded: {first_line(error)}") from error
        return found

    def _parts(self, found: Mapping[str, Any]) -> list[Any]:
        """The training and the held-out part, or the training part alone."""
        held_out = self.held_out_split or next((name for name in HELD_OUT_NAMES if name in found), None)
        for key, name in (("train_split", self.train_split), ("held_out_split", held_out)):
            require(
                name is None or name in found,
                f"dataset.{key}='{name}' is not a split of '{self.path}' (there are {', '.join(found)})",
            )
        parts = [found[name] for name in (self.train_split, held_out) if name is not None]
        for key, column in (("image", self.image), ("label", self.label)):
            require(
                column in (parts[0].column_names or ()),
                f"dataset.{key}='{column}' is not a column of '{self.path}' (there are {', '.join(parts[0].column_names or ())})",
            )
        return parts

    def _classes(self, parts: list[Any]) -> tuple[Any, ...]:
        """The names of the classes, or the values that the column of labels has: numbers in their order, words in the alphabet's."""
        names = getattr((parts[0].features or {}).get(self.label), "names", None)
        if names is not None:
            return tuple(names)
        values = {row[self.label] for part in parts for row in part.select_columns([self.label])}
        numbers = {value for value in values if isinstance(value, int) and value >= 0}
        require(
            values == numbers or all(isinstance(value, str) for value in values),
            f"dataset.label='{self.label}' of '{self.path}' must hold one word, or one number from 0 up, for each image; it holds "
            + ", ".join(sorted(map(repr, values - numbers if numbers else values))[:3]),
        )
        return tuple(map(str, sorted(values)))

    def _samples(self, part: Any, classes: tuple[str, ...]) -> Iterator[Labelled]:
        """Images with the numbers of their classes."""
        numbered = getattr((part.features or {}).get(self.label), "names", None) is not None
        for row in part.select_columns([self.image, self.label]):
            image, label = row[self.image], row[self.label]
            require(
                isinstance(image, Image.Image),
                f"dataset.image='{self.image}' holds no images but {type(image).__name__}; name the column of images",
            )
            number = label if numbered else classes.index(str(label))
            require(0 <= number < len(classes), f"'{self.path}' has an image without a class (dataset.label='{self.label}')")
            yield image, number
