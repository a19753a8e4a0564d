"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save, save_file
from torch import Tensor

Write = Callable[[Path], None]


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
    host = re.sub(r"[^A-Za-z0-9]+", "-", platform.node())[:20]
    return path.with_name(f".{path.name[:150]}.{host}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in ``folder`` that killed processes left; to be called by its only writer."""
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)


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
