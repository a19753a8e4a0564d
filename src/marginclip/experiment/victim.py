"""Finding the victim that a configuration asks for, training it first where it does not exist yet."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from hydra.utils import get_class
from omegaconf import DictConfig

from marginclip.attacks import Attack
from marginclip.evaluation import Evaluation
from marginclip.experiment.building import VictimSetup, instantiate
from marginclip.experiment.fitting import check_devices, fit_resumably, victim_store
from marginclip.experiment.recipe import victim_recipe
from marginclip.experiment.record import named_parts
from marginclip.experiment.store import Victim
from marginclip.experiment.trainers import build_trainer
from marginclip.experiment.training_access import AttackerAccess
from marginclip.losses import SecondStage
from marginclip.training import PoisonedTraining

log = logging.getLogger(__name__)


def victim_name(config: DictConfig) -> str:
    """The readable part of a victim's folder name."""
    return "-".join([*named_parts(config), f"seed{config.seed}"])


def find_victim(config: DictConfig) -> Victim:
    """The victim's place in the store of ``config.runs_dir``."""
    return victim_store(config).find(victim_name(config), victim_recipe(config))


def obtain_victim(config: DictConfig, setup: VictimSetup) -> tuple[Victim, bool]:
    """The trained victim, and whether it had to be trained now; ``setup.model`` and ``setup.attack`` hold it afterwards."""
    victim = find_victim(config)
    with victim.lock():
        trained_now = victim.record is None
        if trained_now:
            train_victim(config, setup, victim)
    victim.restore(setup.model, setup.attack)
    return victim, trained_now


def train_victim(config: DictConfig, setup: VictimSetup, victim: Victim) -> None:
    """Train, test and store the victim; an interrupted training goes on from its last epoch."""
    stage = None if setup.loss is None else setup.loss.second_stage
    first = None if stage is None else obtain_first_stage(config, setup)
    started = time.perf_counter()
    log.info("training the victim %s", victim.folder.name)
    plan = {"max_epochs": config.training.epochs}
    if setup.attack is not None:
        check_devices(config, get_class(setup.attack.trained_by))
        setup.attack.prepare(AttackerAccess(config, setup, obtain_victim))
        plan = setup.attack.training_plan(config.training.epochs)
    if stage is None:
        before = fit_resumably(config, victim, make_training(config, setup), setup.data, plan)
    else:
        training = make_second_training(config, setup, stage)
        plan = {"max_epochs": stage.num_epochs(config.training.epochs)}
        before = fit_resumably(config, victim, training, setup.data.balanced(), plan)
        setup.model.load_state_dict(training.model.state_dict())
    if setup.attack is not None:
        setup.attack.eval()
    metrics, seconds = test_victim(config, setup, victim.folder), before + time.perf_counter() - started
    record = {"recipe": victim_recipe(config), "metrics": metrics, "seconds": seconds, "torch": torch.__version__}
    if first is not None:
        record["first_stage"] = first.folder.name  # with the seconds that it took
    victim.save(setup.model, setup.attack, record)
    victim.forget_checkpoint()
    log.info("victim %s: %s", victim.folder.name, ", ".join(f"{key} {100 * value:.1f} %" for key, value in metrics.items()))


def obtain_first_stage(config: DictConfig, setup: VictimSetup) -> Victim:
    """The victim of the first stage alone, one of the store like any other; ``setup.model`` has its weights afterwards."""
    first = config.copy()
    first.loss.second_stage = None
    assert setup.loss is not None
    return obtain_victim(first, replace(setup, loss=setup.loss.alone()))[0]


def make_training(config: DictConfig, setup: VictimSetup) -> PoisonedTraining:
    """The module that trains the victim: the attack's own where it has one; of imbalanced data, one that watches rare classes."""
    target, objects = Attack.trained_by if setup.attack is None else setup.attack.trained_by, {}
    if (config.get("imbalance") or {}).get("_target_") is not None and target == Attack.trained_by:
        target, objects = "marginclip.training.LongTailTraining", {"class_counts": setup.data.class_counts}
    settings = {key: config.training[key] for key in ("optimizer", "scheduler", "label_smoothing")}
    training: PoisonedTraining = instantiate(
        settings | {"_target_": target},
        setup.model,
        attack=setup.attack,
        loss=setup.loss,
        seed=config.seed,
        cuda_graphs=config.trainer.cuda_graphs,
        key="training",
        **objects,
    )
    return training


def make_second_training(config: DictConfig, setup: VictimSetup, stage: SecondStage) -> PoisonedTraining:
    """The module that trains the last layer of a copy of ``setup.model``, with the optimizer of the first stage at its own rate."""
    counts = setup.data.class_counts
    settings = {
        "_target_": "marginclip.training.HeadTraining",
        "optimizer": {**config.training.optimizer, "lr": stage.learning_rate},
        "scheduler": {"_target_": "marginclip.training.cosine_to_zero", "_partial_": True},
    }
    training: PoisonedTraining = instantiate(
        settings, copy.deepcopy(stage.loss.adapt(setup.model, counts)), attack=setup.attack, loss=stage.loss, class_counts=counts,
        seed=config.seed, cuda_graphs=config.trainer.cuda_graphs, key="loss.second_stage",
    )  # fmt: skip
    return training


def test_victim(config: DictConfig, setup: VictimSetup, folder: Path) -> dict[str, float]:
    """ACC and, under an attack, ASR and PACC of the model as it is, on the evaluation set."""
    evaluation = Evaluation({"none": setup.model})
    trainer = build_trainer(config, folder, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(evaluation, setup.data, verbose=False)
    return evaluation.results()["none"]
