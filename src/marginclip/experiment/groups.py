"""The groups of options as frozen dataclasses. Each field says what it identifies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, get_type_hints

from marginclip.errors import UserError, nearest, require
from marginclip.experiment.objects import find_object, make
from marginclip.experiment.setting_types import check_values
from marginclip.identity import Identifies

Settings = Mapping[str, Any]
RunOnly = Identifies.RUN
Nothing = Identifies.NOTHING
CLEAN = "clean"  # as training.start_from


@dataclass(frozen=True)
class Choice:
    """The option that was chosen of a ``group``: its ``name`` in folders and tables, and the object that it makes.

    ``settings`` are ``_target_`` and the arguments of the constructor. They can name other objects in the same way.
    """

    group: Annotated[str, Nothing]
    name: str
    settings: Settings

    @classmethod
    def of(cls, group: str, content: Settings) -> Choice | None:
        """The choice of a group; None for options without a ``_target_``, such as ``defense=none``."""
        require(isinstance(content, Mapping), f"{group} must be a group of settings, got {content!r}")
        if content.get("_target_") is None:
            return None
        target = content["_target_"]
        require(isinstance(target, str), f"{group}._target_ must be the name of a class or a function, got {target!r}")
        settings = {key: value for key, value in content.items() if key != "name"}
        return cls(group, str(content.get("name") or str(content["_target_"]).rpartition(".")[2]), settings)

    @classmethod
    def needed(cls, group: str, content: Settings) -> Choice:
        """The choice of a group that must make something."""
        choice = cls.of(group, content)
        if choice is None:
            raise UserError(f"{group} must name what it makes: {group}._target_ is not set")
        return choice

    def make(self, **objects: Any) -> Any:
        """The object; ``objects`` are arguments that no configuration holds."""
        return make(self.settings, key=self.group, **objects)

    def changed(self, **settings: Any) -> Choice:
        """The same choice with other settings."""
        return replace(self, settings={**self.settings, **settings})

    @property
    def target(self) -> Any:
        """The class or function that makes the object."""
        return find_object(str(self.settings["_target_"]), self.group)


@dataclass(frozen=True)
class DatasetSpec:
    """Where images come from, and how training images are augmented."""

    choice: Choice
    augment: Settings

    @classmethod
    def of(cls, content: Settings) -> DatasetSpec:
        """The ``dataset`` group."""
        choice = Choice.needed("dataset", {key: value for key, value in content.items() if key != "augment"})
        return cls(choice, content.get("augment") or {})

    def source(self, **settings: Any) -> Any:
        """The object whose ``load`` gives the images."""
        return self.choice.changed(**settings).make()


@dataclass(frozen=True)
class TrainingSpec:
    """How a victim is trained. ``optimizer`` and ``scheduler`` name factories.

    ``start_from`` is None for a fresh model, a file of weights, or ``clean``: the victim of the same run that ``base``, another
    group of these settings, trains without an attack.
    """

    epochs: int
    batch_size: int
    label_smoothing: float
    optimizer: Settings
    scheduler: Settings | None
    start_from: str | None = None
    base: Settings | None = None

    def __post_init__(self) -> None:
        require(
            self.start_from is None or (isinstance(self.start_from, str) and self.start_from != ""),
            f"training.start_from must be clean, a file of weights or null, got {self.start_from!r}",
        )
        require(
            self.start_from != CLEAN or isinstance(self.base, Mapping),
            f"training.start_from=clean needs training.base, the settings that the clean model is trained with, got {self.base!r}",
        )
        require(whole_number(self.epochs, 1), f"training.epochs must be a whole number from 1 up, got {self.epochs!r}")
        require(whole_number(self.batch_size, 1), f"training.batch_size must be at least 1, got {self.batch_size!r}")
        self.from_scratch  # noqa: B018 (its mistakes are told at once)

    @property
    def from_scratch(self) -> TrainingSpec:
        """How the model is trained that this training starts from; itself, where it starts from a fresh one."""
        try:
            return self if self.base is None else filled(TrainingSpec, "training.base", self.base)
        except UserError as error:
            raise UserError(str(error).replace("training.", "training.base.").replace("base.base.", "base.")) from error


@dataclass(frozen=True)
class TrainerSpec:
    """Where and in what precision is computed. ``further`` options of Lightning's Trainer act on the training of victims alone."""

    target: Annotated[str, Nothing]
    accelerator: Annotated[str, RunOnly]
    devices: Annotated[Any, RunOnly]
    precision: str
    strategy: Annotated[str, RunOnly] = "auto"
    threads: Annotated[int | None, RunOnly] = None
    cuda_graphs: Annotated[bool, Nothing] = True
    enable_progress_bar: Annotated[bool, Nothing] = True
    enable_model_summary: Annotated[bool, Nothing] = False
    log_every_n_steps: Annotated[int, Nothing] = 50
    num_sanity_val_steps: Annotated[int, Nothing] = 0
    use_distributed_sampler: Annotated[bool, Nothing] = False
    further: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(isinstance(self.cuda_graphs, bool), f"trainer.cuda_graphs must be true or false, got {self.cuda_graphs!r}")
        require(
            self.threads is None or whole_number(self.threads, 1),
            f"trainer.threads must be null or a count from 1 up, got {self.threads!r}",
        )
        require(
            self.strategy == "auto" or any(way in str(self.strategy) for way in ("spawn", "fork")),
            f"trainer.strategy='{self.strategy}' starts the whole command once more for every device: use auto, or a strategy that starts "
            "processes for the training alone, such as ddp_spawn or ddp_fork",
        )
        for key in ("max_epochs", "min_epochs", "callbacks", "logger", "default_root_dir", "enable_checkpointing"):
            hint = "; use training.epochs" if key == "max_epochs" else ""
            require(key not in self.further, f"trainer.{key} is set by the run itself{hint}")

    @classmethod
    def of(cls, content: Settings) -> TrainerSpec:
        """The ``trainer`` group; what it holds beside our own fields is handed on to Lightning."""
        own = {each.name for each in fields(cls)} - {"target", "further"}
        known = {key: value for key, value in content.items() if key in own}
        further = {key: value for key, value in content.items() if key not in own and key != "_target_"}
        for key in ("_target_", "accelerator", "devices", "precision"):
            require(key in content, f"trainer needs the key '{key}': set it instead of deleting it")
        check_values(known, "trainer", get_type_hints(cls, include_extras=True))
        return cls(target=content["_target_"], further=further, **known)


@dataclass(frozen=True)
class DetectorSpec:
    """The detector at test time. ``folds`` repairs give its null distribution; 0 takes the images of the repair itself."""

    folds: int = 2
    theta: float = 0.005
    null_distribution: str = "tail"
    statistic: str = "drop"
    rule: str = "paper"
    correction: str = "exclude"

    def __post_init__(self) -> None:
        require(
            whole_number(self.folds, 0) and self.folds != 1,
            f"defense.detector.folds must be 0 (no cross-fitting) or at least 2, got {self.folds}",
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the detector itself."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "folds"}


@dataclass(frozen=True)
class DefenseSpec:
    """A defense, the names of its rows in the results, and its detector."""

    choice: Choice
    repaired_row: str
    detector_row: str | None = None
    detector: DetectorSpec | None = None

    @classmethod
    def of(cls, content: Settings) -> DefenseSpec | None:
        """The ``defense`` group; None for ``defense=none``."""
        own = ("repaired_row", "detector_row", "detector")
        choice = Choice.of("defense", {key: value for key, value in content.items() if key not in own})
        if choice is None:
            return None
        detector = content.get("detector")
        require(
            detector is None or isinstance(detector, Mapping),
            f"defense.detector must be a group of settings, got '{detector}'; use defense=mmdf",
        )
        row = content.get("repaired_row") or choice.name
        return cls(
            choice,
            row,
            content.get("detector_row"),
            None if detector is None else filled(DetectorSpec, "defense.detector", detector),
        )

    @property
    def named_detector_row(self) -> str:
        """The detector's row: the one given, or the repaired row's name and ``_mmdf``."""
        return self.detector_row or f"{self.repaired_row}_mmdf"


def filled(kind: Any, key: str, content: Settings) -> Any:
    """A dataclass from a group's settings; raises :class:`UserError` for keys that it does not have, or that are missing."""
    known = [each.name for each in fields(kind)]
    for name in content:
        require(name in known, f"unknown key '{key}.{name}'{nearest(str(name), known)}")
    try:
        made = kind(**content)
    except TypeError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key} lacks a setting: it needs {', '.join(known)}") from error
    check_values(content, key, get_type_hints(kind, include_extras=True))
    return made


def whole_number(value: Any, least: int) -> bool:
    """Whether ``value`` is a whole number from ``least`` up."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
