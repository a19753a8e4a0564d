"""The first page: what is there, what is missing, and what does not go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from marginclip.record import RunRecord
from marginclip.reporting.dashboard.runs import Run
from marginclip.reporting.dashboard.sweeps import Sweep, read_sweeps
from marginclip.reporting.groups import LEFT_OUT, Group, row_group, section, section_title
from marginclip.reporting.summary import divided, mixed

STATUSES = {"done": "done", "attack_failed": "attack failed", "failed": "failed", "running": "running"}


@dataclass(frozen=True)
class Overview:
    """Counts of runs by status and by what they ran on, the sweeps, and what is to be looked at."""

    statuses: dict[str, int]
    sweeps: list[Sweep]
    unreadable: list[str]
    stopped: list[Run]
    untaken: list[Run]
    notes: list[tuple[str, list[str]]]
    made_with: dict[str, Counter[str]]

    @property
    def missing(self) -> int:
        """Cells of sweeps that have no outcome."""
        return sum(sweep.count("missing") for sweep in self.sweeps)


def overview(runs_dir: Path, runs: list[Run], unreadable: list[str]) -> Overview:
    """What the first page shows of the runs below ``runs_dir``."""
    counted = Counter(str(run.record.status) for run in runs)
    return Overview(
        statuses={status: counted[status] for status in STATUSES},
        sweeps=read_sweeps(runs_dir, runs),
        unreadable=unreadable,
        stopped=[run for run in runs if run.record.status in ("failed", "running")],
        untaken=[run for run in runs if run.record.status == "attack_failed"],
        notes=list(_mixed_settings([run.record for run in runs])),
        made_with=_made_with(runs),
    )


def _mixed_settings(records: list[RunRecord]) -> Iterator[tuple[str, list[str]]]:
    """The title of each section of the summary that averages over runs of different settings, with a note for each such row."""
    sections: dict[Group, dict[Group, list[RunRecord]]] = {}
    for record in records:
        if record.status not in LEFT_OUT:
            sections.setdefault(section(record), {}).setdefault(row_group(record), []).append(record)
    for group, cells in sections.items():
        notes = [note for key, counted in divided(cells).items() if (note := mixed(key, counted))]
        if notes:
            yield section_title(group), notes


def _made_with(runs: list[Run]) -> dict[str, Counter[str]]:
    """For each package, and for device and precision, how many runs have which."""
    found: dict[str, Counter[str]] = {}
    for run in runs:
        device = run.record.device
        has = dict(run.record.versions)
        if device is not None:
            threads = f", {device.threads} thread{'s' if device.threads > 1 else ''}" if device.accelerator == "cpu" else ""
            has["device"] = f"{device.accelerator}: {device.name}{threads}"
        has["precision"] = run.record.precision or "not noted"
        for key, value in has.items():
            found.setdefault(key, Counter())[value] += 1
    return found
