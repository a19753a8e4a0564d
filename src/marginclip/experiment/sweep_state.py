"""The state of a sweep, read from what its jobs leave in its folder: what was asked for, and the state of every cell."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from marginclip.durations import duration
from marginclip.sweep_files import ASKED, OUTCOME, content_of, is_alive, sign_of

VICTIMS = "victims"


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep: its ``state`` is done, failed, running, killed or missing, and ``why`` says more."""

    overrides: str
    state: str
    why: str = ""
    record: str | None = None


@dataclass(frozen=True)
class SweepState:
    """All cells of a sweep of ``command``, and of its first stage, the victims."""

    folder: Path
    cells: list[Cell]
    victims: list[Cell]
    command: str = "defend"

    def count(self, *states: str) -> int:
        """How many cells are in one of these states."""
        return sum(cell.state in states for cell in self.cells)

    def seconds_left(self, seconds: float) -> float | None:
        """What is left at the speed of the ``seconds`` since it began; None while nothing is through."""
        through = self.count("done", "failed")
        return seconds / through * (len(self.cells) - through) if through else None

    def sentence(self, seconds: float | None = None) -> str:
        """The counts in words."""
        counts = Counter(cell.state for cell in self.cells)
        parts = [f"{counts['done']} of {len(self.cells)} cells done"]
        parts += [f"{counts[state]} {state}" for state in ("failed", "running", "killed") if counts[state]]
        if counts["missing"]:
            parts.append(f"{counts['missing']} left")
        left = None if seconds is None else self.seconds_left(seconds)
        return ", ".join(parts + ([f"about {duration(left)} left"] if left else []))


def sweep_state(folder: Path) -> SweepState:
    """The state of the sweep in ``folder``, of cells ``0``, ``1`` ... and victims ``victims/0`` ..."""
    command = (content_of(folder / ASKED) or {}).get("command", "defend")
    return SweepState(folder, _cells(folder, _asked(folder)), _cells(folder / VICTIMS, _asked(folder / VICTIMS)), command)


def _cells(folder: Path, asked: list[str]) -> list[Cell]:
    begun = {int(path.name) for path in folder.glob("*") if path.name.isdigit()}
    return [
        cell_state(folder / str(number), asked[number] if number < len(asked) else "")
        for number in sorted(begun | {*range(len(asked))})
    ]


def cell_state(folder: Path, overrides: str) -> Cell:
    """The state of the cell whose job writes to ``folder``."""
    outcome = content_of(folder / OUTCOME)
    if outcome:
        told, error = outcome["overrides"], outcome["error"]
        return Cell(told, "done", record=outcome["record"]) if error is None else Cell(told, "failed", error)
    sign = sign_of(folder)
    if sign is None:
        return Cell(overrides, "missing", "not begun" if not folder.exists() else "begun, and ended without an outcome")
    who = f"process {sign['pid']} on {sign['host']}"
    if is_alive(sign):
        since = duration(time.time() - sign["started"])
        return Cell(sign["overrides"], "running", f"{who} for {since}" + (f": {sign['doing']}" if sign["doing"] else ""))
    return Cell(sign["overrides"], "killed", f"{who}, no sign of life for {duration(time.time() - sign['seen'])}")


def _asked(folder: Path) -> list[str]:
    """What the sweep in ``folder`` asked for; empty where it has not said so yet."""
    asked: list[str] = (content_of(folder / ASKED) or {}).get("asked", [])
    return asked
