"""What a run asks of its process, and of those that train on several devices."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from marginclip.allocator import keep_freed_memory
from marginclip.silence import silence_lightning


def prepare_process(threads: int | None) -> None:
    """Take so many CPU threads, where the number is given, silence Lightning, and keep freed memory."""
    silence_lightning()
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()


class OwnProcess(L.Callback):
    """Asks the same of the process that a fit runs in, which with several devices starts with Lightning's own settings."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads

    def setup(self, *_: Any, **__: Any) -> None:
        prepare_process(self.threads)
