"""What a logger of the ``logger`` group is: a Lightning logger while a run goes on, and a place for its results when it is through."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marginclip.errors import first_line, require
from marginclip.experiment.objects import make
from marginclip.experiment.recipe import find_victim
from marginclip.experiment.spec import RunSpec
from marginclip.record import RunRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedRun:
    """A run as loggers see it: its ``folder``, its ``name``, and its ``job``, ``train`` or ``defend``."""

    spec: RunSpec
    folder: Path
    job: str
    name: str

    @property
    def labels(self) -> dict[str, str]:
        """What runs are filtered by: data set, model, attack, X2X setting and defense."""
        spec = self.spec
        named = {
            "dataset": spec.dataset.choice.name,
            "model": spec.model.name,
            "attack": "none" if spec.attack is None else spec.attack.name,
            "x2x": None if spec.attack is None or spec.x2x is None else spec.x2x.name,
            "defense": None if spec.defense is None else spec.defense.choice.name,
        }
        return {key: value for key, value in named.items() if value is not None}

    @property
    def victim(self) -> str:
        """The name that a victim and all runs of it share, so that they can be joined."""
        return str(self.spec.weights) if self.spec.from_checkpoint else find_victim(self.spec).folder.name


class Destination(ABC):
    """One place that a run is logged to. ``lightning`` is its Lightning logger, which exists after :meth:`start`."""

    lightning: Any = None

    @abstractmethod
    def start(self, run: LoggedRun) -> None:
        """Make the Lightning logger of a run that begins."""

    def publish(self, record: RunRecord, figures: list[Path]) -> None:
        """Send the results of a run and its ``figures``."""
        self.lightning.log_metrics(summary_metrics(record))
        self.lightning.save()

    def publish_sweep(self, sweep_dir: Path, tables: Mapping[str, tuple[list[str], list[list[Any]]]]) -> None:  # noqa: B027
        """Send the tables (columns and rows by name) of a finished sweep; a destination without tables keeps none."""

    def close(self, status: str) -> None:
        """End the run, ``done`` or ``failed``, so that the next one of a sweep in this process is another."""
        self.lightning.finalize("success" if status == "done" else "failed")


class RunLoggers:
    """All destinations of one run.

    Args:
        destinations: the places that it is logged to; there may be none.
    """

    def __init__(self, destinations: list[Destination]) -> None:
        self.destinations = destinations

    @property
    def lightning(self) -> Any:
        """What a Trainer takes: the Lightning loggers; False where there are none."""
        return [each.lightning for each in self.destinations] or False

    def publish(self, record: RunRecord, figures: list[Path]) -> None:
        """Send the results of a run and its ``figures`` everywhere. The run is done by then: a destination that fails is told, no more."""
        for each in self.destinations:
            with told(each, "take the results of a run that is done"):
                each.publish(record, figures)


@contextmanager
def opened_loggers(spec: RunSpec, folder: Path, *, job: str, name: str) -> Iterator[RunLoggers]:
    """The loggers of one run; they are closed at the end, as ``failed`` after an exception.

    Args:
        spec: the run; its ``logger`` group names the destinations.
        folder: the folder of the run, which they write under.
        job: ``train`` or ``defend``.
        name: what the run is called at its destinations.

    Yields:
        The loggers, begun.

    Raises:
        UserError: for a destination that cannot be made, or cannot begin.
    """
    loggers = RunLoggers([destination(name_, settings) for name_, settings in spec.logger.items()])
    run = LoggedRun(spec, folder, job, name)
    for each in loggers.destinations:
        each.start(run)
    status = "failed"
    try:
        yield loggers
        status = "done"
    finally:
        for each in loggers.destinations:
            with told(each, "be closed"):
                each.close(status)


@contextmanager
def told(destination: Destination, what: str) -> Iterator[None]:
    """Log what goes wrong inside in one sentence instead of raising it: the run's own files are whole."""
    try:
        yield
    except Exception as error:  # of somebody else's service, or of the network
        name = type(destination).__module__.rpartition(".")[2]
        log.error("logger=%s could not %s (%s: %s)", name, what, type(error).__name__, first_line(error))


def destination(name: str, settings: Any) -> Destination:
    """The destination that the entry ``name`` of the ``logger`` group makes."""
    known = isinstance(settings, dict) and "_target_" in settings
    require(known, f"logger.{name} must be a group of settings with a _target_, as conf/logger/csv.yaml, got {settings!r}")
    made: Destination = make(settings, key=f"logger.{name}")
    return made


def summary_metrics(record: RunRecord) -> dict[str, float]:
    """The results by names that are the same in all runs: ``mmac/asr`` by row, and ``repaired/asr``, ``detector/tpr`` by what a row is.

    A bar chart over runs of several defenses needs the latter. Values that could not be measured are left out.
    """
    detector = next((row for row, each in record.rows.items() if "detector" in each.phases), None)
    rows = {**record.metrics, "repaired": record.metrics.get(record.repaired_row or "", {})}
    rows["detector"] = record.metrics.get(detector or "", {})
    found = {f"{row}/{name}": value for row, values in rows.items() for name, value in values.items() if value is not None}
    found |= {f"seconds/{phase}": seconds for phase, seconds in record.seconds.items()}
    if (test := record.detection) is not None:
        found |= {"detection/p_value": test.p_value, "detection/detected": float(test.detected)}
        found["detection/suspect"] = float(test.suspect)
    return found
