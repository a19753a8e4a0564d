"""The record of a run: ``run.json`` and its folder, named by what was asked for."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from marginclip.devices import gpu_wanted
from marginclip.errors import UserError
from marginclip.experiment.building import plain, runs_dir
from marginclip.experiment.checkpoints import file_digest
from marginclip.experiment.recipe import images_digest
from marginclip.files import read_json, write_json
from marginclip.precision import precision_for

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "wandb")
NO_EFFECT = ("runs_dir", "logger", "figures")
FINISHED = ("done", "attack_failed")


def run_folder(config: DictConfig) -> Path:
    """The folder of the run that ``config`` asks for: readable options and a hash of everything that changes its result."""
    content = {key: value for key, value in plain(config).items() if key not in NO_EFFECT}
    content["trainer"] = {
        key: value for key, value in content["trainer"].items() if not key.startswith("enable_") and key != "cuda_graphs"
    }
    if content["defense"].get("scale_rate") is None:  # records of before that option existed have none
        content["defense"].pop("scale_rate", None)
    content["dataset"] = {
        key: value for key, value in content["dataset"].items() if key not in ("cache", "memory_gib", "download")
    }
    for group in ("detect", "imbalance", "loss"):
        if not (content.get(group) or {}).get("_target_"):
            content.pop(group, None)
    content["checkpoint"] = file_digest(config.victim.get("path"))
    if (images := images_digest(config)) is not None:
        content["images"] = images
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]
    name = "-".join([*named_parts(config), config.defense.name, f"seed{config.seed}", digest])
    return runs_dir(config) / name


def named_parts(config: DictConfig) -> list[str]:
    """What a victim is, for the readable part of a folder's name."""
    parts = [config.dataset.name, config.model.get("name", "model")]
    if config.get("imbalance") and config.imbalance.name != "none":
        ratio = config.imbalance.ratio
        parts.append(
            f"{config.imbalance.name}{ratio:g}" if isinstance(ratio, (int, float)) else f"{config.imbalance.name}{ratio}"
        )
    if config.get("loss") and config.loss.name != "cross_entropy":
        parts.append(config.loss.name)
    parts.append(config.attack.name)
    return parts if config.attack.name == "none" else [*parts, config.x2x.name]


class Record:
    """The content of ``run.json``, kept while a run goes on and written whole at its end.

    ``status`` is ``done``, ``attack_failed`` or ``failed``; fractions are in [0, 1], times in seconds, memory in MiB.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        found = read_json(self.path)
        self.finished = isinstance(found, dict) and found.get("status") in FINISHED
        self.content: dict[str, Any] = found if self.finished else _opening(config)
        self.content.setdefault("seconds", {})

    @property
    def path(self) -> Path:
        """Where the record is."""
        return self.folder / "run.json"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the seconds that the block takes under ``name``."""
        started = time.perf_counter()
        yield
        self.content["seconds"][name] = round(time.perf_counter() - started, 3)

    def finish(self, status: str) -> None:
        """Write the record with its final status."""
        self.content["status"] = status
        self.content["peak_memory_mib"] = peak_memory_mib()
        write_json(self.path, self.content)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """On an exception write a record with status ``failed`` and the reason, then let the exception go on."""
        try:
            yield
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.content["error"] = reason
            with suppress(OSError):  # a full disk takes no record; the first error is the one to report
                self.finish("failed")
            raise


def peak_memory_mib() -> dict[str, float]:
    """The most memory that the process held so far, and the most on the GPU where one was used."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    peak = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # wandb, where only logger=none and csv are used
        return None


def _opening(config: dict[str, Any]) -> dict[str, Any]:
    accelerator = config["trainer"]["accelerator"]
    gpu = gpu_wanted(accelerator)
    return {
        "status": "running",
        "config": config,
        "seed": config["seed"],
        "versions": {"python": platform.python_version(), "marginclip": version("marginclip")}
        | {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "device": {
            "name": torch.cuda.get_device_name() if gpu else platform.machine(),
            "accelerator": "gpu" if gpu else "cpu",
            "threads": torch.get_num_threads(),
        },
        "precision": precision_for(config["trainer"]["precision"], accelerator=accelerator),
        "seconds": {},
        "metrics": {},
    }
