"""How long a training took in all, when it was interrupted."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


class TrainingTime(L.Callback):
    """Counts the seconds of a training across interruptions: ``before`` are those up to the checkpoint that it goes on from, else 0."""

    def __init__(self) -> None:
        self.before, self.started = 0.0, time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.before + time.perf_counter() - self.started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = float(state_dict["seconds"])
