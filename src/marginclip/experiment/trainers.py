"""Lightning Trainers of the ``trainer`` group: one device for most of a run, all of them for the training of a victim."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from marginclip.experiment.groups import TrainerSpec
from marginclip.experiment.objects import make
from marginclip.experiment.training_progress import TrainingProgress
from marginclip.experiment.whole_checkpoints import WholeCheckpoints
from marginclip.precision import precision_for
from marginclip.silence import SILENT, without_lightning_messages

# Our own settings, and what is given to each Trainer in another form.
NOT_LIGHTNINGS = ("target", "further", "threads", "cuda_graphs", "precision", "devices", "strategy")


def device_of(spec: TrainerSpec) -> torch.device:
    """Where the ``trainer`` group computes."""
    device: torch.device = build_trainer(spec, **SILENT).strategy.root_device
    return device


def num_devices(spec: TrainerSpec) -> int:
    """How many devices train a victim."""
    if spec.devices == 1:
        return 1
    options = {"_target_": spec.target, "accelerator": spec.accelerator, "devices": spec.devices}
    options["plugins"] = [LightningEnvironment()]
    with without_lightning_messages():
        count: int = make(options, key="trainer", **SILENT).num_devices
    return count


def build_trainer(
    spec: TrainerSpec, folder: Path | None = None, *, spread: str | None = None, shown: str | None = None, **settings: Any
) -> L.Trainer:
    """A Trainer of the ``trainer`` group that writes under ``folder``; ``settings`` override the group's; a fit is shown as ``shown``.

    ``spread`` is the Lightning strategy for several devices, where the group names none. With it the Trainer takes all of
    ``trainer.devices``, with a process for each that lives for one fit, and all of the group's settings. A victim is trained so;
    what else a run does is short, and takes the first device alone and the settings that are not about training.
    """
    options = {each.name: getattr(spec, each.name) for each in fields(spec) if each.name not in NOT_LIGHTNINGS}
    options |= {"_target_": spec.target, "devices": first_device(spec.devices)}
    if spread is not None:
        options |= {**spec.further, "devices": spec.devices}
        if num_devices(spec) > 1:
            options["strategy"] = spread if spec.strategy == "auto" else spec.strategy
    options |= {} if folder is None else {"default_root_dir": str(folder)}
    options["enable_progress_bar"] = False  # ours in its place
    if shown is not None and spec.enable_progress_bar:
        settings["callbacks"] = [*settings.get("callbacks", []), TrainingProgress(shown)]
    # We alone start processes: a scheduler's variables are about others.
    options["plugins"] = [WholeCheckpoints(), *options.get("plugins", [LightningEnvironment()])]
    precision = precision_for(spec.precision, accelerator=spec.accelerator)
    with without_lightning_messages():
        trainer: L.Trainer = make(options, key="trainer", **({"precision": precision} | settings))
    return trainer


def first_device(devices: Any) -> Any:
    """The Trainer's ``devices`` for the first device of several: ``[2, 3]`` and ``"2,3"`` give ``[2]``, a count gives 1."""
    if isinstance(devices, str) and "," in devices:
        return [int(devices.partition(",")[0])]
    return devices[:1] if isinstance(devices, list) else 1
