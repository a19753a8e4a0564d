"""Trainers that write nothing, without Lightning's adverts, device lines and own endings; what the user should see is logged by us."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from marginclip.signals import TERMINATED

# Settings of a Trainer that writes nothing.
SILENT: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
PATTERNS = (
    r".*does not have many workers.*",
    r".*`?isinstance\(treespec, LeafSpec\).*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists and is not empty.*",  # earlier rows are kept under another name
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*You are using `LightningModule.*",
    r".*Starting from v1.9.0, `tensorboardX`.*",
    r".*Trying to infer the `batch_size`.*",
    r".*`configure_optimizers` returned `None`.*",
    r".*GPU available but not used.*",
    r".*lr_scheduler.step\(\).*optimizer.step\(\).*",
    r".*`training_step` returned `None`.*",
    r".*The AccumulateGrad node's stream does not match.*",  # what follows from capturing CUDA graphs, harmless
    r".*there was no current CUDA context.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*It is recommended to use `self\.log\(.*sync_dist=True.*",  # torchmetrics brings the devices together
    r"Grad strides do not match bucket view strides.*",  # several devices: a copy more
)


LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


@contextmanager
def without_lightning_messages() -> Iterator[None]:
    """Inside, Lightning logs errors alone and the warnings of ``PATTERNS`` are dropped; afterwards all is as it was."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            _drop_warnings()
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def endings_of_signals() -> Iterator[None]:
    """Around Lightning: SIGTERM exits with 143 where Lightning exits with 0, and Ctrl-C stays a KeyboardInterrupt where it exits with 1."""
    try:
        yield
    except SIGTERMException:
        sys.exit(TERMINATED)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def silence_lightning() -> None:
    """The same for the rest of this process, which must be a command's own: a library does not change its host."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    _drop_warnings()


def silent_trainer(max_epochs: int = 1, **settings: Any) -> L.Trainer:
    """A Trainer on one device that writes nothing: no logger, checkpoints, progress bar or adverts. ``settings`` override that.

    What it says while it fits is silenced by :func:`without_lightning_messages` around the call.
    """
    alone: dict[str, Any] = {"devices": 1, "plugins": [LightningEnvironment()]}  # whatever a scheduler started beside it
    with without_lightning_messages():
        return L.Trainer(max_epochs=max_epochs, **(alone | SILENT | settings))


def on_gpu_of(model: nn.Module) -> dict[str, Any]:
    """Settings of a Trainer that computes on the GPU that ``model`` is on; none for a model on another device, where Lightning chooses."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {"accelerator": "gpu", "devices": [device.index or 0]} if device.type == "cuda" else {}


def nested_trainers(trainer: L.Trainer) -> Callable[[int], L.Trainer]:
    """What makes silent Trainers for a part of a repair, from a number of epochs: on the device of ``trainer`` and in its precision."""
    device = trainer.strategy.root_device
    devices = 1 if device.index is None else [device.index]
    return lambda epochs: silent_trainer(epochs, accelerator=device.type, devices=devices, precision=trainer.precision)


def _drop_warnings() -> None:
    for pattern in PATTERNS:
        warnings.filterwarnings("ignore", message=pattern)
