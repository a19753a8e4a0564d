"""``marginclip status RUNS_DIR``: what is done, running, failed, killed and missing, and why."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from marginclip.errors import UserError, require
from marginclip.experiment.sweep_state import Cell, SweepState, cell_state, sweep_state
from marginclip.record import find_records, read_record
from marginclip.sweep_files import ALIVE, ASKED

UNFINISHED = ("running", "failed", "killed", "missing")


def main(arguments: list[str]) -> int:
    """Print the status of the sweeps and runs below a folder; returns 0, or 1 after a mistake, told in one sentence."""
    parser = argparse.ArgumentParser(
        prog="marginclip status", description="What is done, running, failed and missing, and why."
    )
    parser.add_argument("runs_dir", type=Path, metavar="RUNS_DIR", help="the runs_dir of the commands")
    given = parser.parse_args(arguments)
    try:
        require(given.runs_dir.is_dir(), f"there is no folder '{given.runs_dir}'")
        for line in status_lines(given.runs_dir):
            print(line)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def status_lines(runs_dir: Path) -> Iterator[str]:
    """The sweeps, the oldest first, with every cell that is not done; single runs under way; then all records by their status."""
    sweeps = [sweep_state(folder) for folder in sweep_folders(runs_dir)]
    for place, sweep in enumerate(sweeps):
        later = [each for each in sweeps[place + 1 :] if each.command == sweep.command]
        done = {cell.overrides for each in later for cell in each.cells if cell.state == "done"}
        yield from sweep_lines(with_later_ones(sweep, done))
    for file in sorted((runs_dir / "hydra").glob(f"*/*/{ALIVE}")):
        cell = cell_state(file.parent, "")
        yield f"{cell.state}: {cell.overrides}: {cell.why}"
    yield from record_lines(runs_dir)


def sweep_folders(runs_dir: Path) -> list[Path]:
    """The folders of sweeps, in the order of their dates."""
    folders = {file.parent for name in (ASKED, "multirun.yaml") for file in (runs_dir / "sweeps").glob(f"*/*/{name}")}
    return sorted(folders)


def with_later_ones(sweep: SweepState, done: set[str]) -> SweepState:
    """A sweep in which cells count as done that a later one of the same command with the same options has ``done``."""
    cells = [replace(cell, state="done", why="") if cell.overrides in done else cell for cell in sweep.cells]
    return replace(sweep, cells=cells)


def sweep_lines(sweep: SweepState) -> Iterator[str]:
    """One sweep: its counts, and a line for each victim and cell that is not done."""
    yield f"sweep {'/'.join(sweep.folder.parts[-2:])}: {sweep.sentence()}"
    yield from (_line(cell, "victim of ") for cell in sweep.victims if cell.state in UNFINISHED)
    yield from (_line(cell) for cell in sweep.cells if cell.state in UNFINISHED)


def record_lines(runs_dir: Path) -> Iterator[str]:
    """All records by their status, and those that did not come to a result, with why."""
    counts: Counter[str] = Counter()
    told = []
    for folder in find_records(runs_dir):
        try:
            record = read_record(folder)
        except UserError as error:
            counts["unreadable"] += 1
            told.append(f"  unreadable: {error}")
            continue
        counts[record.status.replace("_", " ")] += 1
        if record.status == "failed":
            told.append(f"  failed: {folder.name}: {record.error}")
        elif record.status == "attack_failed":
            asr = record.metrics["none"]["asr"]
            told.append(f"  attack failed: {folder.name}: ASR {100 * (asr or 0):.1f} % before the repair")
    victims = len(list((runs_dir / "victims").glob("*/victim.json")))
    yield f"runs: {', '.join(f'{count} {status}' for status, count in sorted(counts.items())) or 'none'}; {victims} victims trained"
    yield from told


def _line(cell: Cell, what: str = "") -> str:
    return f"  {cell.state}: {what}{cell.overrides or '(no options)'}: {cell.why}"
