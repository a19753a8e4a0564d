"""A repair as a folder to keep: bounds, the detector's null, classes, settings, and the digest of the model that they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.clipping.serving import NetworkPair, PairedNetwork, paired
from marginclip.defenses import MMAC, Defense
from marginclip.defenses.base import TrainerFactory
from marginclip.defenses.clipping.tolerance import check_tolerance, hold, keeps_bounds, tell
from marginclip.defenses.cross_fitting import check_folds, cross_fitted
from marginclip.errors import UserError, require
from marginclip.files import bytes_writer, json_writer, tensor_bytes, write_all_whole
from marginclip.maxmargin import Detection, MarginDropDetector
from marginclip.maxmargin.detector import check_settings
from marginclip.networks.layout import channels_last
from marginclip.networks.logits import check_images, class_numbers, clean_logits
from marginclip.networks.memory import images_at_once
from marginclip.silence import silent_trainer

DESCRIPTION, TENSORS = "artefact.json", "artefact.safetensors"
Side = Annotated[int, Field(ge=1, le=2**14)]
SCHEMA_VERSION: Literal[1] = 1


class DetectorSettings(BaseModel):
    """The settings of the detector: see :class:`~marginclip.maxmargin.MarginDropDetector`."""

    model_config = ConfigDict(extra="forbid")

    theta: float
    null_distribution: str
    statistic: str = "drop"  # what an artefact without it was made with
    rule: str
    correction: str


class Description(BaseModel):
    """The content of ``artefact.json``."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    schema_version: Literal[1] = SCHEMA_VERSION
    method: str = Field(description="what repaired the model")
    classes: list[str]
    image_shape: tuple[Side, Side, Side] = Field(description="channels, height, width of the images that the model takes")
    model: dict[str, Any] | None = Field(description="the settings that make the architecture, normalisation among them")
    model_path: str | None = Field(description="where the model's weights were read from")
    model_digest: str = Field(description="SHA-256 of the model's weights, by name, shape and value")
    tensors_digest: str = Field(description="SHA-256 of the file of tensors beside this one")
    sites: list[str] = Field(description="the activation calls that are bounded")
    channel_axis: int | None
    changes_weights: bool = Field(description="whether the repair holds weights of its own")
    detector: DetectorSettings
    threshold: float | None = Field(description="the statistic from which on an image is flagged; null: never")
    clean_images: int
    accuracy: float = Field(description="of the model, on the clean images")
    repaired_accuracy: float = Field(description="of repairs that had not seen the image, on the same")
    findings: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Artefact:
    """A model with its repair and detector, ready to decide about images; :meth:`save` keeps the repair in a folder.

    Called with images (N, C, H, W) in [0, 1], of ``image_shape``, it returns a :class:`~marginclip.maxmargin.Detection`. :meth:`fit`
    makes one.

    Args:
        model: the classifier as it was given.
        network: the same with bounds.
        detector: of the two.
        classes: the names of the classes, in the order of the logits.
        image_shape: (C, H, W) of the images.
        facts: further entries of :class:`Description`, as :meth:`fit` makes them; :meth:`save` needs ``method``, ``clean_images``,
            ``accuracy`` and ``repaired_accuracy``.
        model_settings: how the architecture was made, where it came from a command line.
        model_path: where the weights were read from, the same.
    """

    model: nn.Module
    network: BoundedNetwork
    detector: MarginDropDetector
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    model_settings: Mapping[str, Any] | None = None
    model_path: str | None = None

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        defense: Defense | None = None,
        classes: tuple[str, ...] | None = None,
        folds: int = 2,
        seed: int = 0,
        make_trainer: TrainerFactory = silent_trainer,
        detector: Mapping[str, Any] | None = None,
        tolerance: float | None = None,
        model_settings: Mapping[str, Any] | None = None,
        model_path: str | None = None,
    ) -> Artefact:
        """Repair a model and fit the detector.

        Args:
            model: the classifier; it is not changed.
            images: clean images (N, C, H, W) in [0, 1], about 50 of every class.
            labels: their classes (N,), whole numbers.
            defense: the repair. None: MMAC.
            classes: the names of the classes, in the order of the logits. None: their numbers.
            folds: further repairs, each of which leaves a part of the images out; the detector's null comes from them.
            seed: of the repairs and the folds.
            make_trainer: makes the Lightning Trainer for a number of epochs.
            detector: settings of the detector: ``theta``, ``null_distribution``, ``statistic``, ``rule``, ``correction``. Without
                a ``statistic`` it is ``both``.
            tolerance: points of accuracy that the repair may cost on images that it has not seen: bounds are relaxed where it costs
                more (:func:`~marginclip.defenses.clipping.tolerance.hold`). None never relaxes them.
            model_settings: how the architecture was made, where it came from a command line.
            model_path: where the weights were read from, the same.

        Returns:
            The artefact.

        Raises:
            UserError: for images, labels or models that do not fit, and for a method whose result has no bounds, as of ``Auto`` where it
                finds no fault.
        """
        check_tolerance(tolerance)
        defense = MMAC(seed=seed) if defense is None else defense
        check_bounds(defense)
        settings = {"statistic": "both"} | dict(detector or {})
        check_settings(settings)
        given, labels = clean_logits(model, images).cpu(), class_numbers(labels)
        names = classes or tuple(str(number) for number in range(given.shape[1]))
        require(len(names) == given.shape[1], f"the model gives logits of {given.shape[1]} classes, not of {len(names)}")
        check_folds(labels, folds)
        result = defense.fit(model, images, labels, make_trainer=make_trainer)
        network = result.network
        if not isinstance(network, BoundedNetwork):
            why = f" ({result.findings['reason']})" if "reason" in result.findings else ""
            raise UserError(
                f"{defense.label} leaves this model without bounds{why}, and an artefact keeps bounds: to bound it all the same, use mmac, "
                "mmdf or mmom"
            )
        others = cross_fitted(defense, model, images, labels, folds=folds, seed=seed, make_trainer=make_trainer)
        fixed = keeps_bounds(defense)
        cost = hold(network, others, images, labels, given, tolerance=tolerance, keep_bounds=fixed)
        tell(cost, tolerance, keep_bounds=fixed)
        fitted = MarginDropDetector.from_logits(model, network, given, cost.logits, **settings)
        facts = {
            "method": defense.label, "clean_images": len(images), "accuracy": cost.before, "repaired_accuracy": cost.after,
            "findings": dict(result.findings) | {"relaxed_for_tolerance": cost.relaxed},
        }  # fmt: skip
        channels, height, width = images.shape[1:]
        return cls(model, network, fitted, names, (channels, height, width), facts, model_settings, model_path)

    @cached_property
    def served(self) -> PairedNetwork | NetworkPair:
        """Images to the logits of the model and of its repair, of the fewest passes; made at the first use."""
        return paired(self.model, self.network)

    @torch.no_grad()
    def logits(self, images: Tensor, *, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """The logits (N, K) of the model and of its repair for images (N, C, H, W) in [0, 1], however many."""
        check_images(images)
        shown, taken = (" x ".join(str(side) for side in shape) for shape in (images.shape[1:], self.image_shape))
        require(
            shown == taken, f"images must be of {taken} (channels, height, width), as the artefact was made with, got {shown}"
        )
        device = next((parameter.device for parameter in self.network.parameters()), images.device)
        parts = [self.served(batch.to(device)) for batch in images.split(batch_size or images_at_once(images))]
        model, repaired = (torch.cat([part[place].float() for part in parts]) for place in (0, 1))
        return model, repaired

    def __call__(self, images: Tensor) -> Detection:
        """Decisions, flags and p-values of images (N, C, H, W) in [0, 1]."""
        return self.detector.decide(*self.logits(images))

    def save(self, folder: str | Path) -> Path:
        """Write the two files of the artefact into ``folder``: an older artefact there stays until both are written whole.

        Raises :class:`UserError` for ``facts`` that are not those of :meth:`fit`.
        """
        folder, network = Path(folder), self.network
        changed = self._own_weights()
        tensors = {f"bounds/{name}": value for name, value in network.bounds_state().items()}
        tensors |= {f"weights/{name}": value for name, value in changed.items()}
        tensors |= {"null/statistics": self.detector.clean_drops, "null/margins": self.detector.clean_margins}
        content = tensor_bytes(tensors)
        threshold = self.detector.threshold
        try:
            description = Description(
                classes=list(self.classes), image_shape=self.image_shape,
                model=None if self.model_settings is None else dict(self.model_settings), model_path=self.model_path,
                model_digest=model_digest(self.model), tensors_digest=hashlib.sha256(content).hexdigest(),
                sites=[name for name, _ in network.each()], channel_axis=network.channel_axis, changes_weights=bool(changed),
                detector=DetectorSettings(**{key: getattr(self.detector, key) for key in DetectorSettings.model_fields}),
                threshold=threshold if threshold < float("inf") else None, **self.facts,
            )  # fmt: skip
        except ValidationError as error:
            places = ", ".join(dict.fromkeys(str(each["loc"][0]) for each in error.errors()))
            raise UserError(
                f"the artefact cannot be saved: it lacks {places} as {DESCRIPTION} holds them; Artefact.fit gives these facts"
            ) from error
        write_all_whole({
            folder / TENSORS: bytes_writer(content),
            folder / DESCRIPTION: json_writer(description.model_dump(mode="json")),
        })  # fmt: skip
        return folder

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> Artefact:
        """The artefact in ``folder``, on the ``model`` that it was made for.

        Raises :class:`UserError` for a folder that holds none, for files that are truncated or do not belong together, and for
        another model.
        """
        found, folder = read_artefact(folder), Path(folder)
        digest = model_digest(model)
        require(
            digest == found.model_digest,
            f"the artefact '{folder}' was made for another model: its digest is {found.model_digest[:12]}, that of the given model "
            f"{digest[:12]}",
        )
        tensors = _read_tensors(folder / TENSORS, found.tensors_digest)
        bounds = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith("bounds/")}
        example = torch.zeros(1, *found.image_shape).to(next(model.parameters(), torch.zeros(())))  # its device and precision
        network = BoundedNetwork(
            model, example, channel_axis=found.channel_axis, sites=found.sites, offsets="offsets" in bounds, scaled="scale" in bounds
        )  # fmt: skip
        if found.changes_weights:
            weights = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith("weights/")}
            network.network.load_state_dict(network.network.state_dict() | weights)
        network.load_bounds(bounds)
        channels_last(network)  # as it is learned: the same bits
        detector = MarginDropDetector(
            model, network, tensors["null/statistics"], tensors["null/margins"], **found.detector.model_dump()
        )  # fmt: skip
        facts = {key: getattr(found, key) for key in ("method", "clean_images", "accuracy", "repaired_accuracy", "findings")}
        return cls(model, network, detector, tuple(found.classes), found.image_shape, facts, found.model, found.model_path)

    def _own_weights(self) -> dict[str, Tensor]:
        """The weights of the repair, where it has other ones than the model."""
        example = torch.zeros(1, *self.image_shape).to(next(self.model.parameters(), torch.zeros(())))
        untouched = BoundedNetwork(self.model, example, channel_axis=self.network.channel_axis,
                                   sites=[name for name, _ in self.network.each()]).network.state_dict()  # fmt: skip
        own = {name: value for name, value in self.network.network.state_dict().items() if not name.startswith("bound_")}
        same = own.keys() <= untouched.keys() and all(
            torch.equal(value.cpu(), untouched[name].cpu()) for name, value in own.items()
        )
        return {} if same else own


def check_bounds(defense: Defense) -> None:
    """Raise :class:`UserError` for a defense that never bounds activations: an artefact keeps bounds."""
    require(
        defense.bounds_activations is not False,
        f"{defense.label} does not bound activations: an artefact keeps bounds, so use mmac, mmdf or mmom",
    )


def read_artefact(folder: str | Path) -> Description:
    """What ``artefact.json`` of the folder says. Raises :class:`UserError` where there is none, or not a whole one."""
    file = Path(folder) / DESCRIPTION
    require(file.is_file(), f"'{folder}' is no artefact: it has no {DESCRIPTION}; marginclip repair writes one")
    try:
        return Description.model_validate(json.loads(file.read_text()))
    except (ValidationError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(f"'{file}' is damaged or of another version ({reason})") from error


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers by name, type, shape and value; counters of batches are left out."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        plain = value.detach().cpu().contiguous(memory_format=torch.contiguous_format)
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_tensors(file: Path, digest: str) -> dict[str, Tensor]:
    require(file.is_file(), f"the artefact lacks its file '{file}'")
    require(_file_digest(file) == digest, f"'{file}' is damaged or does not belong to the {DESCRIPTION} beside it")
    try:
        tensors = load_file(file)
        require({"null/statistics", "null/margins"} <= tensors.keys(), f"'{file}' lacks the detector's null")
        return tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{file}' is no complete safetensors file ({error})") from error


def _file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
