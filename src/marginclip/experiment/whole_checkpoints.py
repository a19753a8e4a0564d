"""Checkpoints of interrupted trainings, as files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from marginclip.errors import UserError, first_line
from marginclip.files import write_whole


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there.

    Lightning's own goes through the folder for temporary files. That is often on another disk, from which a file is copied: a process
    that is killed meanwhile leaves half a checkpoint in the place of the last one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_whole(Path(path), lambda partial: torch.save(checkpoint, partial))

    def load_checkpoint(self, path: Any, *arguments: Any, **settings: Any) -> dict[str, Any]:
        try:
            found: dict[str, Any] = super().load_checkpoint(path, *arguments, **settings)
        except (MemoryError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # whatever torch meets in a damaged file
            raise UserError(
                f"the checkpoint '{path}' is damaged ({first_line(error)}): remove it, and the same command begins anew"
            ) from error
        return found
