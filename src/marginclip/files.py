"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step; the old file stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: Any) -> Path:
    """``content`` as indented JSON."""
    text = json.dumps(content, indent=2, sort_keys=False, allow_nan=False) + "\n"
    return write_whole(path, lambda partial: _write_text(partial, text))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Tensors as safetensors; those that share memory are written as copies, which that format asks for."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return write_whole(path, lambda partial: save_file(plain, partial, metadata=metadata))


def read_json(path: Path) -> Any:
    """The content of a JSON file; None when there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
