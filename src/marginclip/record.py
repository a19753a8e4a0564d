"""The record of a run, ``run.json``: what it holds, and the one place that reads and writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from marginclip.errors import UserError
from marginclip.files import write_json

SCHEMA_VERSION: Literal[2] = 2
FILE_NAME = "run.json"
FINISHED = ("done", "attack_failed")
Status = Literal["running", "done", "attack_failed", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Row(_Part):
    """One method that was evaluated: a network, or a detector with the network that it compares the model with."""

    label: str = Field(description="what tables call it")
    phases: list[str] = Field(default_factory=list, description="the entries of `seconds` that it took to obtain it")


class Device(_Part):
    """Where the run computed."""

    name: str
    accelerator: Literal["cpu", "gpu"]
    threads: int = Field(description="CPU threads")


class VictimSource(_Part):
    """Where the model came from: a victim of the store, or a file."""

    folder: str | None = Field(default=None, description="the victim's folder in the store")
    trained_now: bool | None = Field(default=None, description="whether it was trained for this run")
    path: str | None = Field(default=None, description="the checkpoint's file")


class DetectionTest(_Part):
    """What a test of the model as given found (`detect=mmbd`)."""

    test: str
    statistics: list[float] = Field(description="the largest margin of every class, in logits")
    p_value: float
    uncalibrated_p_value: float = Field(description="the published p-value")
    alpha: float
    detected: bool
    suspect: int = Field(description="the class of the largest statistic")
    true_target: int | None = Field(description="the attack's one target class; null where there is none or several")
    shape: float = Field(description="shape of the Gamma null distribution")
    scale: float = Field(description="scale of the Gamma null distribution, in logits")


class Flagged(_Part):
    """How many clean images a detector flagged."""

    images: int
    flagged: int


class RunRecord(_Part):
    """Everything about one run that tables, figures and dashboards are made from. Shares are in [0, 1], times in seconds."""

    schema_version: Literal[2] = SCHEMA_VERSION
    status: Status = "running"
    error: str | None = Field(default=None, description="why the run failed")
    config: dict[str, Any] = Field(description="the composed configuration, all interpolations resolved")
    identity: dict[str, Any] = Field(default_factory=dict, description="what the result depends on: equal ones are one run")
    seed: int
    versions: dict[str, str] = Field(default_factory=dict, description="of Python, marginclip and the main packages")
    device: Device | None = None
    precision: str | None = Field(default=None, description="Lightning's name of the numeric precision")
    seconds: dict[str, float] = Field(
        default_factory=dict, description="by phase: victim, detection, repair, detector, evaluation"
    )
    peak_memory_mib: dict[str, float] = Field(
        default_factory=dict, description="of the process, and of the GPU where one was used"
    )
    victim: VictimSource | None = None
    detection: DetectionTest | None = None
    detector: dict[str, Any] | None = Field(default=None, description="settings and threshold of the test-time detector")
    flagged: Flagged | None = None
    rows: dict[str, Row] = Field(default_factory=dict, description="what was evaluated; the model as given is `none`")
    repaired_row: str | None = Field(default=None, description="the row of the repaired network")
    metrics: dict[str, dict[str, float | None]] = Field(default_factory=dict, description="by row: acc, asr, pacc, fpr ...")
    per_class: dict[str, list[float | None]] = Field(default_factory=dict, description="by row: accuracy of every class")
    classes: list[str] = Field(default_factory=list, description="names of the classes")
    training_counts: list[int] | None = Field(
        default=None, description="training images of every class, where they are imbalanced"
    )
    clean_set_size: int | None = Field(default=None, description="images that the defense was given")
    evaluated_on: Literal["held_out", "clean_set"] | None = None
    needed_asr: float | None = Field(default=None, description="the ASR under which the attack counts as failed")
    history: list[dict[str, float]] = Field(default_factory=list, description="the course of the repair's learning")
    findings: dict[str, Any] = Field(default_factory=dict, description="what the defense found out")
    _folder: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder that the record was read from, or is written to."""
        if self._folder is None:
            raise ValueError("this record was neither read from a folder nor written to one")
        return self._folder

    @property
    def path(self) -> Path:
        """The record's file."""
        return self.folder / FILE_NAME

    @property
    def finished(self) -> bool:
        """Whether the run is through: whether its attack took, too, is another question."""
        return self.status in FINISHED

    def setting(self, key: str) -> Any:
        """The value of a dotted key of the configuration, as ``model.width``; None where it has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def choice(self, group: str) -> str | None:
        """The name of what was chosen of a group of the configuration, as ``attack``; None where nothing was."""
        name = self.setting(f"{group}.name")
        return None if name is None else str(name)

    def class_name(self, number: int) -> str:
        """The name of a class, or its number where it has none."""
        return self.classes[number] if 0 <= number < len(self.classes) else str(number)

    def at(self, folder: Path) -> RunRecord:
        """The record itself, which has its place in ``folder`` from now on."""
        self._folder = Path(folder)
        return self

    def write(self) -> Path:
        """Write ``run.json``, whole or not at all; entries that were never set are left out."""
        content = self.model_dump(mode="json")
        return write_json(self.path, {key: value for key, value in content.items() if value is not None})


def read_record(folder: Path) -> RunRecord:
    """The record in ``folder``.

    Raises :class:`UserError`, which names the file, where the file is missing, cannot be read, has another schema, or does not
    hold what its schema says.
    """
    path = Path(folder) / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no '{path}'") from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(f"'{path}' is not the record of a run (no 'config')")
    version = content.get("schema_version", 1)
    if version != SCHEMA_VERSION:
        raise UserError(
            f"'{path}' is a record of schema {version}, and this version of marginclip reads schema {SCHEMA_VERSION}: do the run again"
        )
    try:
        return RunRecord.model_validate(content, strict=True).at(path.parent)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"'{path}' is not as its schema says: {where}: {first['msg']}") from error


def find_records(root: Path) -> Iterator[Path]:
    """The folders below ``root`` that hold a ``run.json``, in the order of their paths."""
    for file in sorted(Path(root).rglob(FILE_NAME)):
        yield file.parent


def json_schema() -> dict[str, Any]:
    """The JSON schema of ``run.json``."""
    return RunRecord.model_json_schema()


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
