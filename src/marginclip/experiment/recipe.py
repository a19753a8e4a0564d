"""What a training depends on: equal recipes are the same victim, found again instead of trained again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from marginclip.data.folder import ImageFolder, folder_digest
from marginclip.experiment.building import plain
from marginclip.experiment.trainers import EVERYWHERE, num_devices


def victim_recipe(config: DictConfig) -> dict[str, Any]:
    """What a trained victim depends on, as plain containers."""
    groups = plain(config)
    recipe = {key: groups[key] for key in ("attack", "x2x", "seed")} | training_recipe(config)
    if (groups.get("loss") or {}).get("_target_") is not None:
        recipe["loss"] = groups["loss"]
    if "_target_" in recipe["attack"] and recipe["attack"]["_target_"].endswith("no_attack"):
        recipe["x2x"] = None
    if "defender" in recipe["attack"]:
        recipe["clean_order"] = groups["clean_order"]  # the attacker learns bounds on the defender's clean set
    return recipe


def training_recipe(config: DictConfig) -> dict[str, Any]:
    """What every training of ``config`` depends on, with or without an attack, but for its seed."""
    groups = plain(config)
    recipe = {key: groups[key] for key in ("dataset", "model", "training")} | {"precision": groups["trainer"]["precision"]}
    if (groups.get("imbalance") or {}).get("_target_") is not None:
        recipe["imbalance"] = groups["imbalance"]
    further = {key: value for key, value in groups["trainer"].items() if key not in EVERYWHERE}
    devices = num_devices(config)
    found = {"images": images_digest(config), "trainer": further or None, "devices": devices if devices > 1 else None}
    return recipe | {key: value for key, value in found.items() if value is not None}


def images_digest(config: DictConfig) -> str | None:
    """A digest of the files of ``dataset.root``, by their names and sizes, where the user keeps them; None for the data sets of ours."""
    root = config.dataset.get("root")
    if (
        not str(config.dataset["_target_"]).endswith(ImageFolder.__name__)
        or not isinstance(root, str)
        or not Path(root).is_dir()
    ):
        return None
    return folder_digest(Path(root))
