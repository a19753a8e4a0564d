"""What a run asks of its process."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from marginclip.allocator import keep_freed_memory
from marginclip.errors import require


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
