"""The C library's habit of returning freed memory at once, which costs a training on the CPU time at every step."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
LARGEST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones; returns whether the allocator took the request.

    glibc gives large blocks back to the system as soon as they are freed. Each training step frees all its activations and takes
    them again a moment later, and the system must clear every page anew. After this call all blocks come from a heap that is
    shrunk only when 2 GiB at its end are free. Peak memory stays as it is (``benchmarks/training.py --sides lightning
    returning``). The entry scripts call this; importing the package does not. Other C libraries and systems are left alone.
    Memory on a GPU is not concerned.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # musl
        return False
    return all([library.mallopt(M_MMAP_MAX, 0), library.mallopt(M_TRIM_THRESHOLD, LARGEST)])
