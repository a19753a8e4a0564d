"""What the sweeps below a folder asked for, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from marginclip.reporting.dashboard.runs import Run
from marginclip.sweep_files import ASKED, OUTCOME, content_of, is_alive, sign_of


@dataclass(frozen=True)
class Cell:
    """One run that a sweep asked for: its ``overrides``, its ``status``, and its run, or its error, where there is one."""

    number: int
    overrides: str
    status: str
    run: Run | None = None
    error: str | None = None


@dataclass
class Sweep:
    """A multirun of a ``command`` by the ``place`` of its folder; ``complete`` says whether it noted what it asked for, so that all cells
    are known."""

    place: str
    complete: bool
    command: str = "defend"
    cells: list[Cell] = field(default_factory=list)

    def count(self, status: str) -> int:
        """The number of cells of a status."""
        return sum(cell.status == status for cell in self.cells)

    def of(self, *statuses: str) -> list[Cell]:
        """The cells of any of the statuses."""
        return [cell for cell in self.cells if cell.status in statuses]


def read_sweeps(runs_dir: Path, runs: list[Run]) -> list[Sweep]:
    """The sweeps below ``runs_dir``, in the order of their paths.

    A cell without an outcome is ``running`` while its job gives signs of life, else ``missing``: it was not reached, or was interrupted.
    What a later sweep of the same command with the same overrides has done counts as done here, too. A sweep of a version that did not
    note its cells is known by the jobs that it began.
    """
    by_name = {run.record.folder.name: run for run in runs}
    folders = {path.parent for path in runs_dir.rglob(ASKED)} | {path.parent.parent for path in runs_dir.rglob(OUTCOME)}
    sweeps = [_read(folder, str(folder.relative_to(runs_dir)), by_name) for folder in sorted(folders)]
    for place, sweep in enumerate(sweeps):
        later = [other for other in sweeps[place + 1 :] if other.command == sweep.command]
        done = {
            cell.overrides: cell for other in later for cell in other.of("done", "attack_failed", "removed") if cell.overrides
        }
        sweep.cells = [_or_done(cell, done.get(cell.overrides)) for cell in sweep.cells]
    return sweeps


def _read(folder: Path, place: str, by_name: dict[str, Run]) -> Sweep:
    asked = content_of(folder / ASKED)
    names = [str(name) for name in asked["asked"]] if asked and isinstance(asked.get("asked"), list) else []
    begun = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdigit())
    sweep = Sweep(place, complete=bool(names), command=str((asked or {}).get("command", "defend")))
    for number in range(len(names)) if names else begun:
        outcome = content_of(folder / str(number) / OUTCOME)
        text = names[number] if names else _overrides(folder / str(number), outcome)
        sweep.cells.append(_cell(folder / str(number), number, text, outcome, by_name))
    return sweep


def _or_done(cell: Cell, elsewhere: Cell | None) -> Cell:
    """A cell as another sweep has done it, where it came to nothing itself."""
    if elsewhere is None or cell.status not in ("missing", "running", "failed"):
        return cell
    return replace(elsewhere, number=cell.number)


def _lives(job: Path) -> bool:
    sign = sign_of(job)
    return sign is not None and is_alive(sign)


def _cell(folder: Path, number: int, overrides: str, outcome: dict[str, Any] | None, by_name: dict[str, Run]) -> Cell:
    if outcome is None:
        return Cell(number, overrides, "running" if _lives(folder) else "missing")
    if outcome.get("error") is not None:
        return Cell(number, overrides, "failed", error=str(outcome["error"]))
    path = Path(str(outcome.get("record") or ""))
    run = by_name.get(path.parent.name) if path.name == "run.json" else None
    status = run.record.status if run is not None else "removed" if path.name == "run.json" else "done"
    return Cell(number, overrides, status, run)


def _overrides(job: Path, outcome: dict[str, Any] | None) -> str:
    """What a job was told, by its outcome, else by the list that Hydra wrote when it began; an empty text where neither tells."""
    if outcome is not None:
        return str(outcome.get("overrides", ""))
    try:
        listed = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    return " ".join(map(str, listed)) if isinstance(listed, list) else ""
