"""Reading a checkpoint that somebody else trained: safely, and whatever way its keys are wrapped."""

from __future__ import annotations

import hashlib
import os
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from marginclip.errors import UserError, first_line, require

LARGE = 16 * 2**20  # bytes of a file whose digest is worth keeping
WRAPPING_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
PREFIXES = ("module.", "model.", "net.", "network.", "backbone.", "_orig_mod.")
# Names of common implementations of the same networks, and ours.
RENAMES = ((".downsample.", ".shortcut."), ("fc.", "linear."))


def load_checkpoint(path: str | None, model: nn.Module, *, key: str = "victim.path") -> None:
    """Load weights from ``path`` into ``model``; nothing in the file is ever executed (``weights_only=True`` or safetensors).

    Takes safetensors, a plain ``state_dict``, one under a wrapping key or with a prefix such as ``module.``, and Lightning
    checkpoints. Raises :class:`UserError` for a file that is missing, truncated, carries code, or is of another architecture;
    it names the setting ``key``.
    """
    if path is None:
        raise UserError("victim=checkpoint needs victim.path, the checkpoint's file")
    file, told = Path(path), f"{key}='{path}'"
    require(file.is_file(), f"{told} is not a file")
    _load_matching(model, _unwrap(_read(file, told), told), told)


def file_digest(path: str | None) -> str | None:
    """The SHA-256 of a file's content, so that another file under the same name is another run; None where there is none.

    That of a folder is made of the digests of the weights and settings in it.
    """
    if path is not None and Path(path).is_dir():
        files = sorted(file for kind in ("*.safetensors", "*.json") for file in Path(path).glob(kind))
        return hashlib.sha256(" ".join(f"{file.name} {file_digest(str(file))}" for file in files).encode()).hexdigest()
    if path is None or not Path(path).is_file():
        return None
    status = Path(path).stat()
    if status.st_size < LARGE:
        return _content_digest(path)
    return _known_digest(os.path.abspath(path), status.st_size, status.st_mtime_ns)


def _content_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=8)
def _known_digest(path: str, size: int, changed: int) -> str:
    """That of a large file, which a run asks for several times, until it changes."""
    del size, changed
    return _content_digest(path)


def _read(file: Path, told: str) -> Any:
    require(
        file.suffix not in (".onnx", ".pt2"),
        f"{told} is a graph without the network's code: give the weights that it was made from, or a .pt2 file as model=exported "
        "model.path=...",
    )
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{told} is no complete safetensors file ({error})") from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{told} was refused: it carries more than weights (loading it could run code) or is damaged; "
            "save its state_dict as safetensors instead"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever torch meets in a damaged file
        raise UserError(f"{told} is truncated, damaged or no checkpoint ({first_line(error)})") from error


def _unwrap(content: Any, told: str) -> dict[str, Tensor]:
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in WRAPPING_KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    require(bool(state), f"{told} holds no weights (a state_dict, plain or under one of {', '.join(WRAPPING_KEYS)})")
    odd = next((key for key in state if not isinstance(key, str)), "")
    require(odd == "", f"{told} holds weights under {str(odd)[:40]!r}, which is no word: a state_dict goes by names")
    return state


def _load_matching(model: nn.Module, state: dict[str, Tensor], told: str) -> None:
    wanted = model.state_dict()
    candidates = [state]
    stripped = state
    while any(key.startswith(PREFIXES) for key in stripped):
        prefix = next(prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in stripped))
        stripped = {key.removeprefix(prefix): value for key, value in stripped.items() if key.startswith(prefix)}
        candidates.append(stripped)
    candidates += [_renamed(candidate) for candidate in candidates]
    candidates += [{f"network.{key}": value for key, value in candidate.items()} for candidate in candidates]
    best = max(candidates, key=lambda candidate: len(set(candidate) & set(wanted)))
    # Counters of batches, which older checkpoints do not have, change nothing in evaluation.
    best = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")} | best
    missing, extra = sorted(set(wanted) - set(best)), sorted(set(best) - set(wanted))
    odd = [key for key in wanted if key in best and wanted[key].shape != best[key].shape]
    if missing or extra or odd:
        detail = (
            f"'{odd[0]}' has shape {tuple(best[odd[0]].shape)} instead of {tuple(wanted[odd[0]].shape)}"
            if odd
            else f"'{missing[0]}' is missing"
            if missing
            else f"'{extra[0]}' is not part of the model"
        )
        classes = {(len(best[key]), len(wanted[key])) for key in odd if best[key].dim() and wanted[key].dim()}
        if not missing and not extra and len(classes) == 1 and all(best[key].shape[1:] == wanted[key].shape[1:] for key in odd):
            ((theirs, ours),) = classes
            raise UserError(
                f"{told} has {theirs} classes and the data set {ours}: dataset.root needs one sub-folder for each class "
                "of the checkpoint, named so that they sort in its order"
            )
        raise UserError(f"{told} is of another architecture than the model ({detail}); check model and model.width")
    for key, value in best.items():
        fault = _fault(value, wanted[key])
        require(fault is None, f"{told} holds {fault} in '{key}'")
    model.load_state_dict(best)


def _fault(value: Tensor, wanted: Tensor) -> str | None:
    """Why a tensor cannot take the place of a weight; None where it can."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "sparse, quantized or missing weights, not plain ones,"
    if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
        return f"weights of {str(value.dtype).removeprefix('torch.')} instead of {str(wanted.dtype).removeprefix('torch.')}"
    return None if not value.is_floating_point() or torch.isfinite(value).all() else "NaN or infinite weights"


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for old, new in RENAMES:
            key = (
                key.replace(old, new) if old.startswith(".") else (new + key.removeprefix(old) if key.startswith(old) else key)
            )
        renamed[key] = value
    return renamed
