"""Bars on a terminal: a live table of the sweep, where there is one, above the bars of what is under way."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from marginclip.durations import duration
from marginclip.experiment.progress import Display, Task


class Bars(Display):
    """Bars on the standard error, which vanish when all is through; ``table`` gives what stands above them."""

    def __init__(self, table: Callable[[], RenderableType] | None = None, console: Console | None = None) -> None:
        super().__init__()
        self.table, self.console = table, console or Console(stderr=True)
        self.live: Live | None = None

    def begin(self, task: Task) -> None:
        """See :meth:`Display.begin`."""
        super().begin(task)
        if self.live is None:
            both = sys.stdout.isatty()  # where the standard output goes elsewhere, it must not come to the terminal instead
            self.live = Live(
                get_renderable=self.drawn, console=self.console, transient=True, refresh_per_second=4, redirect_stdout=both
            )
            self.live.start()
            redirect_logging()

    def end(self, task: Task) -> None:
        """See :meth:`Display.end`."""
        super().end(task)
        if not self.tasks and self.live is not None:
            self.live.stop()
            self.live = None
            redirect_logging()

    def drawn(self) -> RenderableType:
        """All of it at this moment."""
        bars = Table.grid(padding=(0, 1))
        for task in self.shown:
            of = "" if task.total is None else f"/{task.total}"
            left = task.seconds_left
            told = [
                f"{task.done}{of} {task.unit}" if task.counted else "",
                "" if left is None else f"{duration(left)} left",
                task.note,
            ]
            bars.add_row(task.name, ProgressBar(task.total, task.done, width=24, pulse=task.total is None), *told)
        return Group(self.table(), bars) if self.table is not None else bars


def redirect_logging() -> None:
    """Let handlers that write to the terminal write to what stands for it now, so that lines appear above the bars."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(_current(handler.stream))


def _current(stream: Any) -> Any:
    """The present standard output or error in the place of an earlier one; other streams as they are."""
    original = getattr(stream, "rich_proxied_file", stream)
    for present in (sys.stdout, sys.stderr):
        if original is getattr(present, "rich_proxied_file", present):
            return present
    return original
