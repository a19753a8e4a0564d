"""Which runs share which model as given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from marginclip.reporting.dashboard.runs import Run
from marginclip.reporting.rows import describe


@dataclass(frozen=True)
class VictimRuns:
    """A model as given by its ``name``, what it is, and its runs; ``figures`` are those of the first run that measured it."""

    name: str
    kind: str
    described: str
    seed: int
    runs: list[Run]

    @property
    def figures(self) -> dict[str, float | None]:
        """The metrics of the model as given, shares in [0, 1]; empty where no run has them."""
        return next((run.record.metrics["none"] for run in self.runs if "none" in run.record.metrics), {})


def victims(runs: list[Run]) -> list[VictimRuns]:
    """The models as given, those of most runs first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.victim, []).append(run)
    return sorted((_victim(name, sharing) for name, sharing in groups.items()), key=lambda victim: -len(victim.runs))


def _victim(name: str, runs: list[Run]) -> VictimRuns:
    record, source = runs[0].record, runs[0].record.victim
    kind = "not obtained" if source is None else "checkpoint" if source.path else "trained"
    return VictimRuns(PurePath(name).name or name, kind, describe(record), record.seed, runs)
