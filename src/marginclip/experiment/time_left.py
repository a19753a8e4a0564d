"""How far a repair is, on the standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L

from marginclip.service.estimate import duration


class TimeLeft(L.Callback):
    """Writes at most every ``every`` seconds how many of ``steps`` steps were taken, over all Trainers that share it, and the time left."""

    def __init__(self, steps: int, *, every: float = 10.0) -> None:
        self.steps, self.every = steps, every
        self.done, self.started = 0, time.monotonic()
        self.told = self.started

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Count a step."""
        self.done += 1
        now = time.monotonic()
        if now - self.told < self.every or self.done >= self.steps:
            return
        self.told = now
        left = (now - self.started) / self.done * (self.steps - self.done)
        print(f"{self.done} of about {self.steps} steps, about {duration(left)} left", file=sys.stderr, flush=True)
