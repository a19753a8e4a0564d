"""Training that goes on where it was interrupted, into the store of victims."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from marginclip.data import ImageData
from marginclip.running.build import build_trainer
from marginclip.running.loggers import build_logger, finish_logger
from marginclip.victims import Victim, VictimStore

log = logging.getLogger(__name__)


def victim_store(config: DictConfig) -> VictimStore:
    """The store of ``config.runs_dir``."""
    return VictimStore(Path(config.runs_dir) / "victims")


def fit_resumably(
    config: DictConfig, victim: Victim, training: L.LightningModule, data: ImageData, plan: dict[str, Any]
) -> None:
    """Fit with the Trainer settings of ``plan``, keeping a checkpoint of every epoch with the victim; go on from it where there is one."""
    saver = ModelCheckpoint(
        dirpath=victim.checkpoint.parent,
        filename=victim.checkpoint.stem,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    logger = build_logger(config, victim.folder, job="train", name=victim.folder.name)
    trainer = build_trainer(config, victim.folder, callbacks=[saver], logger=logger, **plan)
    resume = victim.checkpoint if victim.checkpoint.exists() else None
    if resume is not None:
        log.info("going on from %s", resume)
    try:
        trainer.fit(training, data, ckpt_path=resume, weights_only=True if resume else None)
    finally:
        finish_logger(logger)
