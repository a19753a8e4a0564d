"""What a run asks of its process, and of those that train on several devices."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from marginclip.allocator import keep_freed_memory
from marginclip.silence import silence_lightning

_changed: list[tuple[int, int]] = []  # threads of this process before a run took its own number, and that number


def prepare_process(threads: int | None) -> None:
    """Take so many CPU threads, or as many as before another run took its own number, silence Lightning, and keep freed memory."""
    silence_lightning()
    present = torch.get_num_threads()
    if _changed and _changed[0][1] != present:  # somebody else has set them since
        _changed.clear()
    before = _changed.pop()[0] if _changed else present
    if threads is not None:
        _changed.append((before, threads))
    if threads is not None or before != present:
        torch.set_num_threads(before if threads is None else threads)
    keep_freed_memory()


class OwnProcess(L.Callback):
    """Asks the same of the process that a fit runs in, which with several devices starts with Lightning's own settings."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads

    def setup(self, *_: Any, **__: Any) -> None:
        prepare_process(self.threads)
