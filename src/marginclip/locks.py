"""A folder that one process at a time writes, on this host or on another that shares the file system."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from marginclip.errors import UserError
from marginclip.files import remove_leftovers

log = logging.getLogger(__name__)
LOCK = ".lock"
BELOW = ("checkpoint", "figures")  # folders in the folder of a run or a victim that have the same writer
MISSING = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # what file systems without flock answer


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` where it is missing, and be its only writer inside; waits for another one, and says so.

    The lock is that of the operating system: it ends with the process that holds it, however that ends. What killed processes left
    half written in the folder is removed first (:func:`~marginclip.files.remove_leftovers`). Raises :class:`UserError` on a file system
    that has no such locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        _acquire(lock, folder, timeout=0)
    except Timeout:
        log.info("waiting for another process that writes '%s'", folder)
        _acquire(lock, folder, timeout=-1)
    try:
        for place in (folder, *(folder / name for name in BELOW)):
            remove_leftovers(place)
        yield
    finally:
        lock.release()


def _acquire(lock: BaseFileLock, folder: Path, timeout: float) -> None:
    try:
        lock.acquire(timeout=timeout)
    except NotImplementedError as error:
        raise _without_locks(folder) from error
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in MISSING:
            raise
        raise _without_locks(folder) from error


def _without_locks(folder: Path) -> UserError:
    return UserError(
        f"'{folder}' is on a file system without file locks (flock), so two processes could write the same files: use a folder on "
        "another file system, or mount this one with locks (NFS: without nolock; Lustre: with flock)"
    )
