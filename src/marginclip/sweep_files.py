"""The files by which a sweep is known from outside: what it asked for, what became of each job, and which jobs are alive."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

ASKED = "sweep.json"  # in the sweep's folder
OUTCOME = "outcome.json"  # in a job's folder, once it is through
ALIVE = "alive.json"  # in a job's folder, renewed while it runs
STALE = 180.0  # seconds without a sign of life: several were missed, and clocks of hosts differ a little


def content_of(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file, or something else in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def sign_of(folder: Path) -> dict[str, Any] | None:
    """The last sign of life of the job in ``folder``; None where there is none, or it cannot be read."""
    return content_of(folder / ALIVE)


def is_alive(sign: dict[str, Any]) -> bool:
    """Whether a sign of life is a recent one."""
    seen = sign.get("seen")
    return isinstance(seen, (int, float)) and time.time() - seen < STALE
