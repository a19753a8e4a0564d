"""What a run asks of its process, and of those that train on several devices."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from marginclip.allocator import keep_freed_memory
from marginclip.silence import silence_lightning

_before: list[int] = []  # the threads of this process, before runs of a sweep that it shares took their own numbers


def prepare_process(threads: int | None) -> None:
    """Take so many CPU threads, or as many as before another run took its own number, silence Lightning, and keep freed memory."""
    silence_lightning()
    if threads is not None:
        _before.append(torch.get_num_threads())
        torch.set_num_threads(threads)
    elif _before:
        torch.set_num_threads(_before[0])
        _before.clear()
    keep_freed_memory()


class OwnProcess(L.Callback):
    """Asks the same of the process that a fit runs in, which with several devices starts with Lightning's own settings."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads

    def setup(self, *_: Any, **__: Any) -> None:
        prepare_process(self.threads)
