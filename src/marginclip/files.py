"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

from safetensors.torch import save, save_file
from torch import Tensor

Write = Callable[[Path], None]
PARTIAL = re.compile(r"\..+\.([A-Za-z0-9-]*)\.(\d{1,9})\.[0-9a-f]{8}\.partial")  # what partial_of gives: host and process
WEEK = 7 * 24 * 3600.0  # seconds


def write_whole(path: Path, write: Write) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step; the old file stays until then."""
    write_all_whole({path: write})
    return path


def write_all_whole(files: dict[Path, Write]) -> None:
    """Several files that belong together: all are written beside their places first, then moved there one after the other.

    A disk that is full or a write that fails leaves every old file as it was.
    """
    partials = {path: partial_of(path) for path in files}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(partials[path])
            with partials[path].open("rb") as written:
                os.fsync(written.fileno())
        for path, partial in partials.items():
            partial.replace(path)
            _make_lasting(path.parent)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """A name for the temporary file beside ``path`` that no other process, here or on another host, gives to one of its own."""
    return path.with_name(f".{path.name[:150]}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in ``folder`` that killed processes left.

    Such a file has a name of :func:`partial_of`. Its process was on this host and is gone, or nobody wrote to the file for a week.
    """
    for partial in folder.glob(".*.partial"):
        named = PARTIAL.fullmatch(partial.name)
        if named is None or partial.is_dir():
            continue
        with suppress(OSError):  # its process moved it just now, or it is another user's
            if _is_gone(named) or time.time() - partial.stat().st_mtime > WEEK:
                partial.unlink()


def remove_left_folders(path: Path) -> None:
    """Remove the temporary folders beside ``path`` that processes on this host left when they were killed while they made it."""
    for partial in path.parent.glob(f".{escape(path.name[:150])}.*.partial"):
        named = PARTIAL.fullmatch(partial.name)
        if named is not None and _is_gone(named) and partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)


def _is_gone(named: re.Match[str]) -> bool:
    """Whether the process of a temporary name was on this host, and is no more."""
    return named[1] == _host() and not _lives(int(named[2]))


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", platform.node())[:64]


def _lives(process: int) -> bool:
    """Whether a process of this host is there."""
    with suppress(PermissionError):  # it is another user's
        try:
            os.kill(process, 0)  # sends no signal
        except ProcessLookupError:
            return False
    return True


def write_json(path: Path, content: Any) -> Path:
    """``content`` as indented JSON."""
    return write_whole(path, json_writer(content))


def json_writer(content: Any) -> Write:
    """What writes ``content`` as indented JSON; raises ValueError or TypeError at once for what JSON does not hold."""
    text = json.dumps(content, indent=2, sort_keys=False, allow_nan=False) + "\n"
    return lambda partial: _write_text(partial, text)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Tensors as safetensors; those that share memory are written as copies, which that format asks for."""
    plain = _separate(tensors)
    return write_whole(path, lambda partial: save_file(plain, partial, metadata=metadata))


def tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The content of a file of tensors, as :func:`write_tensors` writes it."""
    return save(_separate(tensors))


def bytes_writer(content: bytes) -> Write:
    """What writes ``content`` as it is."""

    def write(partial: Path) -> None:
        partial.write_bytes(content)

    return write


def read_json(path: Path) -> Any:
    """The content of a JSON file; None when there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def _make_lasting(folder: Path) -> None:
    """Let a move in ``folder`` outlive a power cut; some file systems do not offer that for folders, and need not."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
