"""How much memory may be used, and how many images that allows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn

from marginclip.errors import require

SHARE = 0.5  # of what is free
MEMINFO = Path("/proc/meminfo")
# Limit and use of the group of processes that this one is in: of a container, mostly.
GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
OVERHEAD = 2  # what a backward pass holds at its peak, as a multiple of what the forward pass keeps for it
FULL_BATCH, FULL_SIDE = 250, 64  # so many images of this side at a time, where nothing is kept for a backward pass
_budget: ContextVar[int | None] = ContextVar("marginclip_memory_budget", default=None)


@contextmanager
def memory_limited_to(gib: float | None) -> Iterator[None]:
    """Inside, at most ``gib`` GiB are to be used beside what is used already; None: half of what is free, as outside."""
    number = isinstance(gib, (int, float)) and not isinstance(gib, bool)
    require(gib is None or (number and gib > 0), f"memory_gib must be positive or null, got {gib!r}")
    token = _budget.set(None if gib is None else int(gib * 2**30))
    try:
        yield
    finally:
        _budget.reset(token)


def memory_budget(device: torch.device | str = "cpu") -> int:
    """Bytes that may be used on ``device``."""
    given = _budget.get()
    return max(1, int(SHARE * free_memory(device))) if given is None else given


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that are free on ``device``: on the CPU what is available to this process, by its group's limit as well."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_available()]
    for limit, used in GROUPS:
        try:
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return max(1, min(free))


def images_at_once(images: Tensor) -> int:
    """How many images (N, C, H, W) to give a network at a time where no gradient is needed: fewer where they are large."""
    area = max(1, images.shape[-1] * images.shape[-2]) if images.dim() == 4 else 1
    return max(1, min(FULL_BATCH, FULL_BATCH * FULL_SIDE**2 // area))


def images_that_fit(network: nn.Module, image: Tensor, forward: Callable[[Tensor], Tensor], budget: int) -> int:
    """How many images like ``image`` (1, C, H, W) can pass ``network`` by ``forward`` and backward within ``budget`` bytes; at least 1."""
    one, two = (kept_for_backward(network, image.expand(count, -1, -1, -1), forward) for count in (1, 2))
    return max(1, budget // (OVERHEAD * max(1, two - one)))  # the difference: weights in half precision are kept once


def kept_for_backward(network: nn.Module, image: Tensor, forward: Callable[[Tensor], Tensor]) -> int:
    """Bytes that ``forward`` of ``image`` (N, C, H, W) keeps for its backward pass, weights and buffers left out."""
    kept: dict[int, int] = {}
    constants = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constants:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        forward(image.detach().clone().requires_grad_())
    return sum(kept.values())


def _available() -> int:
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
