"""What is asked for, as frozen dataclasses: made from the composed configuration once, at the entry. Each field says what it identifies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from marginclip.errors import nearest, require
from marginclip.experiment.groups import (
    Choice,
    DatasetSpec,
    DefenseSpec,
    Nothing,
    RunOnly,
    Settings,
    TrainerSpec,
    TrainingSpec,
    filled,
    whole_number,
)
from marginclip.experiment.objects import find_object
from marginclip.identity import Identifies, identifying_fields, identifying_settings


@dataclass(frozen=True)
class RunSpec:
    """All that one run depends on, or, without a defense, one victim. ``config`` is the whole composed configuration, for the record."""

    seed: int
    dataset: DatasetSpec
    model: Choice
    training: TrainingSpec
    imbalance: Choice | None
    loss: Choice | None
    attack: Choice | None
    x2x: Choice | None
    trainer: TrainerSpec
    checkpoint: Annotated[str | None, RunOnly]
    from_checkpoint: Annotated[bool, RunOnly]
    detect: Annotated[Choice | None, RunOnly]
    defense: Annotated[DefenseSpec | None, RunOnly]
    clean_per_class: Annotated[int | str | None, RunOnly]
    reserve_per_class: Annotated[int | str | None, RunOnly]
    clean_order: Annotated[str, RunOnly]
    runs_dir: Annotated[Path, Nothing]
    logger: Annotated[Settings, Nothing]
    figures: Annotated[bool, Nothing]
    config: Annotated[Settings, Nothing]

    def __post_init__(self) -> None:
        require(
            whole_number(self.seed, 0) and self.seed < 2**32,
            f"seed must be an integer from 0 up, below 2^32, got {self.seed!r}",
        )
        for key in ("clean_per_class", "reserve_per_class"):
            value = getattr(self, key)
            require(
                value in ("auto", None) or (isinstance(value, int) and not isinstance(value, bool)),
                f"{key} must be a number of images, auto or null, got '{value}'",
            )
        require(
            self.imbalance is None or not self.from_checkpoint,
            f"imbalance={self.imbalance.name if self.imbalance else ''} thins out training images, and victim=checkpoint trains nothing",
        )

    @property
    def weights(self) -> str | None:
        """Where weights are read from: the checkpoint, or the ``path`` of a model that brings its own."""
        return self.checkpoint or self.model.settings.get("path")

    @property
    def names(self) -> Iterator[str]:
        """What the victim is, for the readable part of a folder's name."""
        yield from (self.dataset.choice.name, self.model.name)
        if self.imbalance is not None:
            ratio = self.imbalance.settings.get("ratio")
            yield f"{self.imbalance.name}{ratio:g}" if isinstance(ratio, (int, float)) else f"{self.imbalance.name}{ratio}"
        if self.loss is not None:
            yield self.loss.name
        yield "none" if self.attack is None else self.attack.name
        if self.attack is not None and self.x2x is not None:
            yield self.x2x.name


def run_spec(config: Settings) -> RunSpec:
    """The composed configuration of ``train`` or ``defend``, as plain containers with all interpolations resolved, as a :class:`RunSpec`.

    Raises :class:`UserError` for values that cannot be, naming their key, and for keys that nothing reads.
    """
    victim = config.get("victim", {"kind": "trained"})
    known = {each.name for each in fields(RunSpec)} | {"victim"}
    for key in config:
        require(key in known, f"unknown key '{key}' at the top{nearest(key, known)}")
    for key in ("seed", "runs_dir", "clean_per_class", "reserve_per_class", "clean_order"):
        require(key in config, f"the run needs the key '{key}': set it instead of deleting it")
    kind = victim.get("kind")
    require(kind in ("trained", "checkpoint"), f"victim.kind must be trained or checkpoint, got '{kind}'")
    runs_dir = config["runs_dir"]
    require(isinstance(runs_dir, str) and runs_dir != "", f"runs_dir must be the name of a folder, got {runs_dir!r}")
    figures = config.get("figures", False)
    require(isinstance(figures, bool), f"figures must be true or false, got {figures!r}")
    attack = Choice.of("attack", config["attack"])
    return RunSpec(
        seed=config["seed"],
        dataset=DatasetSpec.of(config["dataset"]),
        model=Choice.needed("model", config["model"]),
        training=filled(TrainingSpec, "training", config["training"]),
        imbalance=Choice.of("imbalance", config["imbalance"]),
        loss=Choice.of("loss", config["loss"]),
        attack=attack,
        x2x=None if attack is None else Choice.needed("x2x", config["x2x"]),
        trainer=TrainerSpec.of(config["trainer"]),
        checkpoint=victim.get("path"),
        from_checkpoint=kind == "checkpoint",
        detect=Choice.of("detect", config.get("detect", {})),
        defense=DefenseSpec.of(config.get("defense", {})),
        clean_per_class=config["clean_per_class"],
        reserve_per_class=config["reserve_per_class"],
        clean_order=config["clean_order"],
        runs_dir=Path(runs_dir),
        logger=config["logger"] or {},
        figures=figures,
        config=config,
    )


def identity(value: Any, what: Identifies) -> Any:
    """Plain content that is equal for equal victims, or runs: what of ``value``, a spec or a part of one, identifies ``what``."""
    if isinstance(value, Choice):
        return {
            "name": value.name,
            **identifying_settings(value.settings, what, lambda target: find_object(target, value.group)),
        }
    if hasattr(value, "__dataclass_fields__"):
        found = {name: identity(entry, what) for name, entry in identifying_fields(value, what).items()}
        own = found.pop("choice", None) or {}  # a group's own settings stand beside what we add to it, as in the configuration
        return own | {name: entry for name, entry in found.items() if entry is not None}
    return identifying_settings(value, what, lambda target: find_object(target, "training"))
