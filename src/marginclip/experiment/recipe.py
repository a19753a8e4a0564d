"""What a victim and a run depend on: equal ones are found again instead of made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from marginclip.experiment.checkpoints import file_digest
from marginclip.experiment.groups import CLEAN
from marginclip.experiment.spec import RunSpec, identity
from marginclip.experiment.store import Victim, VictimStore
from marginclip.experiment.trainers import num_devices
from marginclip.identity import Identifies, digest


def victim_recipe(spec: RunSpec) -> dict[str, Any]:
    """What a trained victim depends on, as plain content."""
    recipe: dict[str, Any] = identity(spec, Identifies.VICTIM)
    devices = num_devices(spec.trainer)
    start = spec.training.start_from
    found = {
        "images": spec.dataset.source().digest(),
        "devices": devices if devices > 1 else None,
        "start_content": None if start == CLEAN else file_digest(start),
        "model_content": file_digest(spec.model.settings.get("path")),
    }
    if spec.attack is not None and spec.attack.target.uses_clean_set:
        found["clean_order"] = spec.clean_order
    return recipe | {key: value for key, value in found.items() if value is not None}


# Methods that give another result than before at the same settings, by how often that changed: their finished runs are done again, and
# interrupted ones begin anew. Whoever changes what a method gives raises its number.
REVISIONS = {"marginclip.defenses.MMAC": 2}


def run_identity(spec: RunSpec) -> dict[str, Any]:
    """What the result of a run depends on, as plain content."""
    found: dict[str, Any] = identity(spec, Identifies.RUN) | {"images": spec.dataset.source().digest()}
    revisions = {target: REVISIONS[target] for target in _targets(found.get("defense")) if target in REVISIONS}
    if revisions:
        found["revisions"] = revisions
    start = None if spec.from_checkpoint or spec.training.start_from == CLEAN else file_digest(spec.training.start_from)
    if start is not None:
        found["start_content"] = start
    return found | {"checkpoint_content": file_digest(spec.weights)}


def _targets(settings: Any) -> set[str]:
    """The classes that these settings name, at any depth."""
    if not isinstance(settings, dict):
        return set()
    own = {settings["_target_"]} if isinstance(settings.get("_target_"), str) else set()
    return own.union(*map(_targets, settings.values()))


def run_folder(spec: RunSpec) -> Path:
    """The folder of a run: readable options, and a digest of everything that changes its result."""
    defense = "none" if spec.defense is None else spec.defense.choice.name
    return spec.runs_dir / "-".join([*spec.names, defense, f"seed{spec.seed}", digest(run_identity(spec))])


def find_victim(spec: RunSpec) -> Victim:
    """The victim's place in the store."""
    return victim_store(spec).find("-".join([*spec.names, f"seed{spec.seed}"]), victim_recipe(spec))


def find_surrogate(spec: RunSpec, settings: dict[str, Any]) -> Victim:
    """The place in the store of a surrogate with these further ``settings``: a clean model of the same data and training."""
    clean = replace(spec, attack=None, x2x=None, loss=None)
    name = f"{spec.dataset.choice.name}-{spec.model.name}-surrogate"
    return victim_store(spec).find(name, victim_recipe(clean) | {"surrogate": settings})


def victim_store(spec: RunSpec) -> VictimStore:
    """The store of ``runs_dir``."""
    return VictimStore(spec.runs_dir / "victims")
