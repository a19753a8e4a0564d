"""The store of trained victims: the same recipe is the same victim, trained once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from marginclip.attacks import Attack
from marginclip.files import read_json, write_json, write_tensors
from marginclip.identity import digest
from marginclip.locks import locked


@dataclass(frozen=True)
class Victim:
    """One trained victim on disk: ``victim.json`` (written last, so its presence means done), weights and attack state."""

    folder: Path

    @property
    def record(self) -> dict[str, Any] | None:
        """Recipe, metrics and seconds; None while it is not trained."""
        record: dict[str, Any] | None = read_json(self.folder / "victim.json")
        return record

    @property
    def weights(self) -> Path:
        """The trained weights, safetensors."""
        return self.folder / "model.safetensors"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that an interrupted training goes on from."""
        return self.folder / "checkpoint" / "last.ckpt"

    @property
    def finished(self) -> bool:
        """Whether it is trained, and the checkpoint of the training is gone."""
        return self.record is not None and not self.checkpoint.exists()

    def lock(self) -> AbstractContextManager[None]:
        """Held while training, so that the parallel runs of a sweep train a shared victim once (:func:`~marginclip.locks.locked`)."""
        return locked(self.folder)

    def save(self, model: nn.Module, attack: Attack | None, record: dict[str, Any]) -> None:
        """Write weights and attack state, then the record."""
        write_tensors(self.weights, model.state_dict())
        if attack is not None and attack.state_dict():
            write_tensors(self.folder / "attack.safetensors", attack.state_dict())
        write_json(self.folder / "victim.json", record)

    def forget_checkpoint(self) -> None:
        """Remove the checkpoint of a training that is done."""
        self.checkpoint.unlink(missing_ok=True)

    def restore(self, model: nn.Module, attack: Attack | None) -> None:
        """Load weights into ``model`` and the attack's state into ``attack``."""
        model.load_state_dict(load_file(self.weights))
        if attack is not None and attack.state_dict():
            attack.load_state_dict(load_file(self.folder / "attack.safetensors"))
            attack.eval()


class VictimStore:
    """A folder of victims, one sub-folder a recipe, named by its main options and the hash of the whole recipe."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, name: str, recipe: dict[str, Any]) -> Victim:
        """The place of the victim with this recipe, trained or not."""
        return Victim(self.root / f"{name}-{digest(recipe)}")
