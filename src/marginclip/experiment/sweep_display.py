"""A sweep as it goes on: a live table on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from marginclip.durations import duration
from marginclip.experiment.progress import INTERVAL, Display, Lines
from marginclip.experiment.progress_bars import Bars
from marginclip.experiment.sweep_state import SweepState, sweep_state
from marginclip.sweep_files import ASKED

EVERY = 2.0  # seconds between two looks at the folder


class SweepWatch:
    """Looks at the folder of a sweep now and then."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.looked = folder, 0.0
        asked = folder / ASKED
        self.began = asked.stat().st_mtime if asked.exists() else time.time()
        self.found = SweepState(folder, [], [])

    def state(self) -> SweepState:
        """The state, at most ``EVERY`` seconds old."""
        if time.monotonic() - self.looked > EVERY:
            self.found, self.looked = sweep_state(self.folder), time.monotonic()
        return self.found

    def line(self) -> str:
        """It in words."""
        state = self.state()
        training = sum(cell.state == "running" for cell in state.victims)
        trained = sum(cell.state == "done" for cell in state.victims)
        first = f"{trained} of {len(state.victims)} victims trained, " if training else ""
        return first + state.sentence(time.time() - self.began)

    def table(self) -> Table:
        """It as a table of one row."""
        state, table = self.state(), Table(box=None, pad_edge=False)
        left = state.seconds_left(time.time() - self.began)
        shown = {
            "cells": len(state.cells), "done": state.count("done"), "failed": state.count("failed"),
            "running": state.count("running"), "left": state.count("missing", "killed"),
            "time left": "-" if left is None else duration(left),
        }  # fmt: skip
        if state.victims:
            trained = sum(cell.state in ("done", "failed") for cell in state.victims)
            shown = {"victims": f"{trained}/{len(state.victims)}", **shown}
        for name in shown:
            table.add_column(name, justify="right")
        table.add_row(*map(str, shown.values()))
        return table


def display_of(sweep: Path | None, *, bars: bool) -> Display:
    """What a job shows, of the sweep in the folder ``sweep``, if it is of one."""
    watch = None if sweep is None else SweepWatch(sweep)
    if bars:
        return Bars(None if watch is None else watch.table)
    return Lines(None if watch is None else watch.line)


class Watching:
    """Shows a sweep from the process that launched it elsewhere, until it is told to stop."""

    def __init__(self, folder: Path) -> None:
        self.watch, self.ended = SweepWatch(folder), threading.Event()
        self.thread = threading.Thread(target=self._bars if sys.stderr.isatty() else self._lines, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Show it no longer."""
        self.ended.set()
        self.thread.join()

    def _lines(self) -> None:
        while not self.ended.wait(INTERVAL):
            print(self.watch.line(), file=sys.stderr, flush=True)

    def _bars(self) -> None:
        console = Console(stderr=True)
        with Live(
            get_renderable=self.watch.table, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        ):
            self.ended.wait()
