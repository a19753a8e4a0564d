"""What a command shows while it works: bars on a terminal, elsewhere a line a minute, and nothing where nobody asked.

The library is silent. A command chooses the display of its process with :func:`use`; what takes long is a :func:`task`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from marginclip.durations import duration

INTERVAL = 60.0  # seconds between two lines


@dataclass
class Task:
    """Something that takes long: ``done`` of ``total`` steps of a kind (``unit``); ``note`` is shown beside it."""

    name: str
    total: int | None = None
    unit: str = "steps"
    done: int = 0
    note: str = ""
    begun_at: int = 0  # steps that were done before, by an interrupted run
    started: float = field(default_factory=lambda: time.monotonic())

    def advance(self, done: int, note: str = "") -> None:
        """Tell that ``done`` steps are through."""
        self.done, self.note = done, note
        _process.display.changed()

    @property
    def counted(self) -> bool:
        """Whether it counts steps."""
        return self.total is not None or self.done > 0

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far; None where that is not known."""
        made = self.done - self.begun_at
        if self.total is None or made <= 0:
            return None
        return (time.monotonic() - self.started) / made * max(0, self.total - self.done)

    def __str__(self) -> str:
        of = f" of {self.total}" if self.total is not None else ""
        left = self.seconds_left
        parts = [
            f"{self.name}: {self.done}{of} {self.unit}" if self.counted else self.name,
            *([] if left is None else [f"about {duration(left)} left"]),
            self.note,
        ]
        return ", ".join(part for part in parts if part)


class Display:
    """Shows nothing; ``tasks`` are those under way, the outer ones first, ``heading`` is a line about what they are part of."""

    def __init__(self, heading: Callable[[], str] | None = None) -> None:
        self.tasks: list[Task] = []
        self.heading = heading

    def begin(self, task: Task) -> None:
        """Show a task that begins."""
        self.tasks.append(task)
        self.changed()

    def changed(self) -> None:
        """Show what has changed."""

    def end(self, task: Task) -> None:
        """Show it no longer."""
        self.tasks.remove(task)

    @property
    def shown(self) -> list[Task]:
        """The tasks that tell something: one that counts no steps is left out while another goes on inside it."""
        tasks = list(self.tasks)
        return [task for task in tasks if task.counted or task is tasks[-1]]

    @property
    def doing(self) -> str:
        """The tasks in words, without what they are part of; empty where there are none."""
        return " | ".join(map(str, self.shown))

    def __str__(self) -> str:
        heading = [self.heading()] if self.heading is not None else []
        return " | ".join(part for part in (*heading, self.doing) if part)


class Lines(Display):
    """A line on the standard error every ``interval`` seconds while there is a task, even one that does not advance."""

    def __init__(self, heading: Callable[[], str] | None = None, interval: float = INTERVAL) -> None:
        super().__init__(heading)
        self.interval = interval
        self.last: float | None = None  # None before the first task
        self.ended: threading.Event | None = None  # ends the thread that looks at the clock; None while there is no task
        self.lock = threading.Lock()

    def begin(self, task: Task) -> None:
        """See :meth:`Display.begin`."""
        super().begin(task)
        if self.ended is None:
            self.ended = threading.Event()
            threading.Thread(target=self._look, args=(self.ended,), daemon=True).start()

    def end(self, task: Task) -> None:
        """See :meth:`Display.end`."""
        super().end(task)
        if not self.tasks and self.ended is not None:
            self.ended.set()
            self.ended = None

    def changed(self) -> None:
        """See :meth:`Display.changed`."""
        with self.lock:
            now = time.monotonic()
            due = self.last is not None and now - self.last >= self.interval
            if due or self.last is None:
                self.last = now
            if due:
                print(self, file=sys.stderr, flush=True)

    def _look(self, ended: threading.Event) -> None:
        while not ended.wait(self.interval / 10):
            self.changed()


@dataclass
class _Process:
    display: Display


_process = _Process(Display())


def use(display: Display) -> None:
    """Choose what this process shows from now on."""
    _process.display = display


def display() -> Display:
    """What this process shows."""
    return _process.display


@contextmanager
def task(name: str, total: int | None = None, unit: str = "steps", done: int = 0) -> Iterator[Task]:
    """Show a task inside; ``done`` steps were made before."""
    shown, made = _process.display, Task(name, total, unit, done, begun_at=done)
    shown.begin(made)
    try:
        yield made
    finally:
        shown.end(made)


def tracked(name: str, unit: str = "steps") -> Callable[[range], Iterable[int]]:
    """What goes through a range and shows how far it is."""

    def track(steps: range) -> Iterator[int]:
        with task(name, len(steps), unit) as made:
            for number, step in enumerate(steps):
                yield step
                made.advance(number + 1)

    return track
