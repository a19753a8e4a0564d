"""Training that goes on where it was interrupted, into the store of victims."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing.spawn import ProcessRaisedException

from marginclip.data import ImageData
from marginclip.errors import UserError, first_line, require
from marginclip.experiment.loggers import opened_loggers
from marginclip.experiment.process import OwnProcess
from marginclip.experiment.spec import RunSpec
from marginclip.experiment.store import Victim
from marginclip.experiment.trainers import build_trainer, num_devices
from marginclip.experiment.training_time import TrainingTime
from marginclip.silence import endings_of_signals
from marginclip.training import ClassifierTraining, CudaGraphs

log = logging.getLogger(__name__)


def fit_resumably(spec: RunSpec, victim: Victim, training: ClassifierTraining, data: ImageData, plan: dict[str, Any]) -> float:
    """Fit with the Trainer settings of ``plan``, keeping a checkpoint of every epoch with the victim; go on from it where there is one.

    Returns the seconds that were spent on it before, 0 where it begins (or where several devices train).
    With several of ``trainer.devices`` each sees its share of every epoch's images, in batches of ``training.batch_size`` of its own.
    """
    check_devices(spec, type(training))
    training_time = TrainingTime()
    callbacks = [checkpoint_saver(victim.checkpoint), training_time, OwnProcess(spec.trainer.threads)]
    callbacks += [CudaGraphs()] if spec.trainer.cuda_graphs else []
    resume = victim.checkpoint if victim.checkpoint.exists() else None
    if resume is not None:
        log.info("going on from %s", resume)
    with opened_loggers(spec, victim.folder, job="train", name=victim.folder.name) as loggers, mistakes_told():
        trainer = build_trainer(
            spec.trainer, victim.folder, spread=training.several_devices or "auto", shown=f"training {victim.folder.name}",
            callbacks=callbacks, logger=loggers.lightning, **plan,
        )  # fmt: skip
        with endings_of_signals():
            trainer.fit(training, data, ckpt_path=resume, weights_only=True if resume else None)
    return training_time.before


@contextmanager
def mistakes_told() -> Iterator[None]:
    """What a Trainer raises inside, in whatever process, as a :class:`UserError` where it is a user's mistake."""
    try:
        yield
    except MisconfigurationException as error:  # a setting of the Trainer that this training does not go with
        raise UserError(f"trainer: {first_line(error)}") from error
    except ProcessRaisedException as error:  # in one of several devices' processes
        told = re.search(r"^\S*\b(UserError|MisconfigurationException): (.+)", str(error), re.MULTILINE)
        if told is None:
            raise
        raise UserError(told.group(2) if told.group(1) == "UserError" else f"trainer: {told.group(2)}") from error


def checkpoint_saver(path: Path) -> ModelCheckpoint:
    """What writes a checkpoint to ``path`` after every epoch."""
    return ModelCheckpoint(dirpath=path.parent, filename=path.stem, save_on_train_epoch_end=True, enable_version_counter=False)


def check_devices(spec: RunSpec, training: type[ClassifierTraining]) -> None:
    """Raise :class:`UserError` where a kind of training takes one device and the run asks for several."""
    require(
        training.several_devices is not None or num_devices(spec.trainer) == 1,
        f"attack={spec.attack.name if spec.attack else 'none'} trains on one device, got trainer.devices={spec.trainer.devices}",
    )
