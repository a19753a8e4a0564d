"""A file that a job renews while it is alive, so that others, on any host, see what it does and whether it was killed."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from marginclip.experiment import progress
from marginclip.files import write_json
from marginclip.sweep_files import ALIVE, is_alive, sign_of

EVERY = 20.0  # seconds


@contextmanager
def alive(folder: Path, overrides: str, every: float = EVERY) -> Iterator[None]:
    """Renew ``alive.json`` in ``folder`` inside, and remove it at the end. A file that stays belongs to a killed job."""
    file, ended = folder / ALIVE, threading.Event()
    sign: dict[str, Any] = {"overrides": overrides, "host": platform.node(), "pid": os.getpid(), "started": time.time()}
    sign["slurm_job"] = os.environ.get("SLURM_JOB_ID")

    def renew() -> None:
        while True:
            with suppress(OSError):  # a full disk ends no run
                write_json(file, sign | {"seen": time.time(), "doing": progress.display().doing})
            if ended.wait(every):
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
        _remove_those_of_killed(folder, overrides)
    finally:
        ended.set()
        thread.join()
        file.unlink(missing_ok=True)


def _remove_those_of_killed(folder: Path, overrides: str) -> None:
    """Remove what killed jobs with the same options left in folders beside that of a job that is through."""
    for file in folder.parent.parent.glob(f"*/*/{ALIVE}"):
        sign = sign_of(file.parent)
        if file.parent != folder and sign is not None and sign["overrides"] == overrides and not is_alive(sign):
            file.unlink(missing_ok=True)
