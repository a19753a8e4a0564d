"""What a run asks of its process, and of those that train on several devices."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from marginclip.allocator import keep_freed_memory
from marginclip.errors import require
from marginclip.silence import silence_lightning


def prepare_process(config: DictConfig) -> None:
    """Take ``trainer.threads`` CPU threads, where it is given, and keep freed memory."""
    threads = config.trainer.threads
    if threads is not None:
        require(
            isinstance(threads, int) and not isinstance(threads, bool) and threads >= 1,
            f"trainer.threads must be null or a count from 1 up, got {threads!r}",
        )
        torch.set_num_threads(threads)
    keep_freed_memory()


class OwnProcess(L.Callback):
    """Asks the same of the process that a fit runs in, which with several devices starts with Lightning's own settings."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config

    def setup(self, *_: Any, **__: Any) -> None:
        silence_lightning()
        prepare_process(self.config)
