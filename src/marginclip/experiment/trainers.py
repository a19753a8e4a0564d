"""Lightning Trainers of the ``trainer`` group: one device for most of a run, all of them for the training of a victim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from marginclip.errors import require
from marginclip.experiment.building import instantiate, plain
from marginclip.precision import precision_for
from marginclip.silence import silence_lightning

OWN_SETTINGS = ("precision", "threads", "cuda_graphs")  # of the ``trainer`` group, and not the Trainer's own
# Entries that every Trainer of a run takes; further ones are for the training of victims, which depend on them.
EVERYWHERE = (
    "_target_", "accelerator", "devices", "strategy", *OWN_SETTINGS, "enable_progress_bar", "enable_model_summary",
    "log_every_n_steps", "num_sanity_val_steps", "use_distributed_sampler",
)  # fmt: skip
SET_BY_RUNS = ("max_epochs", "min_epochs", "callbacks", "logger", "default_root_dir", "enable_checkpointing")


def device_of(config: DictConfig, folder: Path) -> torch.device:
    """Where the ``trainer`` group computes."""
    device: torch.device = build_trainer(config, folder, logger=False, enable_checkpointing=False).strategy.root_device
    return device


def num_devices(config: DictConfig) -> int:
    """How many devices train a victim."""
    if config.trainer.devices == 1:
        return 1
    options = {key: plain(config.trainer)[key] for key in ("_target_", "accelerator", "devices")}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    silence_lightning()
    count: int = instantiate(options, key="trainer", **dict.fromkeys(quiet, False)).num_devices
    return count


def build_trainer(config: DictConfig, folder: Path, *, spread: str | None = None, **settings: Any) -> L.Trainer:
    """A Trainer of the ``trainer`` group that writes under ``folder``; ``settings`` override the group's.

    With ``spread``, the Lightning strategy for several devices where the group names none, it takes all of ``trainer.devices``: a
    process for each, started for one fit and gone after it, and all of the group's settings. A victim is trained so; what else a run
    does is short, and takes the first device alone and the settings that are not about training.
    """
    silence_lightning()
    graphs = config.trainer.cuda_graphs
    require(isinstance(graphs, bool), f"trainer.cuda_graphs must be true or false, got {graphs!r}")
    options = {key: value for key, value in plain(config.trainer).items() if key not in OWN_SETTINGS}
    strategy = options.pop("strategy", "auto")
    require(
        strategy == "auto" or any(way in str(strategy) for way in ("spawn", "fork")),
        "trainer.strategy must be auto or one that starts processes for the training alone, such as ddp_spawn or ddp_fork, got "
        f"'{strategy}', which starts the whole command once more for every device",
    )
    taken = next((key for key in SET_BY_RUNS if key in options), None)
    require(
        taken is None, f"trainer.{taken} is set by the run itself{'; use training.epochs' if taken == 'max_epochs' else ''}"
    )
    if spread is None:
        options = {key: value for key, value in options.items() if key in EVERYWHERE}
        options["devices"] = first_device(options["devices"])
    elif num_devices(config) > 1:
        options["strategy"] = spread if strategy == "auto" else strategy
    precision = precision_for(config.trainer.precision, accelerator=config.trainer.accelerator)
    return instantiate(options, key="trainer", precision=precision, default_root_dir=str(folder), **settings)


def first_device(devices: Any) -> Any:
    """The Trainer's ``devices`` for the first device of several: ``[2, 3]`` and ``"2,3"`` give ``[2]``, a count gives 1."""
    if isinstance(devices, str) and "," in devices:
        return [int(devices.partition(",")[0])]
    return devices[:1] if isinstance(devices, list) else 1
