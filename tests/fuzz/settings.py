"""Every numeric setting of conf/ with values that it should not take: ``python tests/fuzz/settings.py [--sample N]``.

It walks the composed options, so a new key is covered by itself. Each value must make the objects of its group, without any training, or
be refused by one sentence that names the key. Of the values in ``NONSENSE`` no number may be made at all.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from marginclip.data import Augment
from marginclip.errors import UserError
from marginclip.experiment.command import plain
from marginclip.experiment.objects import make
from marginclip.experiment.setup import build_attack, build_loss
from marginclip.experiment.spec import RunSpec, run_spec
from marginclip.experiment.stages import make_methods
from marginclip.experiment.trainers import build_trainer, num_devices
from marginclip.silence import SILENT

CONF = Path(__file__).parents[2] / "conf"
VALUES: tuple[Any, ...] = (-1, 0, 1e30, math.nan, math.inf, "abc", None, [1], True)
NONSENSE = (math.nan, math.inf, "abc", [1])
SECONDS = 5.0  # the longest that one set of objects may take on a busy machine
GROUPS = ("attack", "dataset", "defense", "detect", "imbalance", "logger", "loss", "model", "trainer", "training", "x2x")
HERE = {
    "trainer": ("exact",),
    "model": ("small_resnet", "resnet18", "resnet20", "resnet32", "torchvision"),
}  # of others elsewhere


@dataclass(frozen=True)
class Setting:
    """One numeric key of a composed configuration: where it stands, its value, and the ``owner`` that it is an argument of."""

    content: dict[str, Any]
    path: tuple[str, ...]
    value: Any
    owner: str

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def changed(self, value: Any) -> dict[str, Any]:
        """The whole configuration with another value there."""
        content = copy.deepcopy(self.content)
        node = content
        for name in self.path[:-1]:
            node = node[name]
        node[self.path[-1]] = value
        return content


@cache
def settings() -> list[Setting]:
    """Every numeric key of every option, once for each class or group that takes it."""
    found: dict[tuple[str, str], Setting] = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for group in GROUPS:
            for file in sorted((CONF / group).glob("*.yaml")):
                if file.stem not in HERE.get(group, (file.stem,)):
                    continue
                content = plain(compose("defend", overrides=[f"{group}={file.stem}"]))
                if "root" in content["dataset"]:
                    content["dataset"]["root"] = str(CONF)  # a folder that exists; nothing is read from it
                for setting in numbers(content, content[group], (group,), group):
                    found.setdefault((setting.owner, setting.path[-1]), setting)
        content = plain(compose("defend"))
        for setting in numbers(
            content, {key: value for key, value in content.items() if not isinstance(value, dict)}, (), "run"
        ):
            found[setting.owner, setting.path[-1]] = setting
    return list(found.values())


def numbers(content: dict[str, Any], node: dict[str, Any], path: tuple[str, ...], owner: str) -> Iterator[Setting]:
    """The numeric keys below ``node``; those that are null by default too, as most of them are numbers where they are set."""
    owner = node.get("_target_") or owner
    for name, value in node.items():
        if isinstance(value, dict):
            yield from numbers(content, value, (*path, name), f"{owner}.{name}")
        elif name.startswith("_") or name == "root":
            continue
        elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            yield Setting(content, (*path, name), value, owner)


def build(content: dict[str, Any], group: str) -> None:
    """Make what the settings of ``group`` make: on digits' shapes, nothing trained, nothing read."""
    spec = run_spec(content)
    if group in BUILDERS:
        BUILDERS[group](spec)


def build_training(spec: RunSpec) -> None:
    """The optimizer, and the schedule over 100 steps."""
    for training in (spec.training, spec.training.from_scratch):
        optimizer = make(training.optimizer, key="training.optimizer")
        built = call("training.optimizer", optimizer, [torch.nn.Parameter(torch.zeros(1))])
        if training.scheduler is not None:
            call("training.scheduler", make(training.scheduler, key="training.scheduler"), built, total_steps=100)


def call(key: str, factory: Any, *arguments: Any, **settings: Any) -> Any:
    """What a library's factory makes; what it refuses is told as a run tells it."""
    try:
        return factory(*arguments, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {error}") from error


@dataclass(frozen=True)
class Shapes:
    """As much of a data set as an attack is made from."""

    held_out: Any
    image_shape: tuple[int, int, int] = (3, 32, 32)


@dataclass(frozen=True)
class Classes:
    classes: tuple[str, ...] = tuple("0123456789")


BUILDERS = {
    "attack": lambda spec: build_attack(spec, Shapes(Classes())),
    "x2x": lambda spec: build_attack(spec, Shapes(Classes())),
    "dataset": lambda spec: (spec.dataset.source(), Augment(**spec.dataset.augment)),
    "defense": make_methods,
    "detect": make_methods,
    "imbalance": lambda spec: spec.imbalance and spec.imbalance.make(),
    "loss": build_loss,
    "model": lambda spec: spec.model.make(num_classes=10, in_channels=3),
    "trainer": lambda spec: (num_devices(spec.trainer), build_trainer(spec.trainer, **SILENT)),
    "training": build_training,
}  # fmt: skip


def fault(setting: Setting, value: Any) -> str | None:
    """What is wrong with how a value is taken; None where it is taken or refused as it should."""
    started = time.process_time()
    try:
        build(setting.changed(value), setting.path[0])
    except UserError as error:
        message = str(error)
        if "\n" in message or (setting.path[-1] not in message and setting.path[0] not in message):
            return f"its refusal is not one sentence that names it: {message!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        if any(value is each for each in NONSENSE) and isinstance(setting.value, (int, float)):
            return "it was accepted"
    seconds = time.process_time() - started
    return None if seconds < SECONDS else f"it took {seconds:.0f} s"


def pairs(sample: int | None = None, seed: int = 0) -> list[tuple[Setting, Any]]:
    """Every key with every value, or so many of them at random."""
    every = [(setting, value) for setting in settings() for value in VALUES]
    return every if sample is None else random.Random(seed).sample(every, sample)


def faults(tried: list[tuple[Setting, Any]]) -> Iterator[str]:
    """What is wrong with which pair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for setting, value in tried:
            found = fault(setting, value)
            if found is not None:
                yield f"{setting.key}={value!r} ({setting.owner}): {found}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tried, count = pairs(given.sample, given.seed), 0
    for each in faults(tried):
        count += 1
        print(each, flush=True)
    print(f"{len(tried)} pairs, {count} faults")
    sys.exit(bool(count))
