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
from marginclip.losses import SecondStage
from marginclip.running.build import Scene, instantiate
from marginclip.running.fitting import check_devices, fit_resumably, victim_store
from marginclip.running.recipe import victim_recipe
from marginclip.running.record import named_parts
from marginclip.running.trainers import build_trainer
from marginclip.running.workshop import VictimWorkshop
from marginclip.training import PoisonedTraining
from marginclip.victims import Victim

log = logging.getLogger(__name__)


def victim_name(config: DictConfig) -> str:
    """The readable part of a victim's folder name."""
    return "-".join([*named_parts(config), f"seed{config.seed}"])


def find_victim(config: DictConfig) -> Victim:
    """The victim's place in the store of ``config.runs_dir``."""
    return victim_store(config).find(victim_name(config), victim_recipe(config))


def obtain_victim(config: DictConfig, scene: Scene) -> tuple[Victim, bool]:
    """The trained victim, and whether it had to be trained now; ``scene.model`` and ``scene.attack`` hold it afterwards."""
    victim = find_victim(config)
    with victim.lock():
        trained_now = victim.record is None
        if trained_now:
            train_victim(config, scene, victim)
    victim.restore(scene.model, scene.attack)
    return victim, trained_now


def train_victim(config: DictConfig, scene: Scene, victim: Victim) -> None:
    """Train, test and store the victim; an interrupted training goes on from its last epoch."""
    stage = None if scene.loss is None else scene.loss.second_stage
    first = None if stage is None else obtain_first_stage(config, scene)
    started = time.perf_counter()
    log.info("training the victim %s", victim.folder.name)
    plan = {"max_epochs": config.training.epochs}
    if scene.attack is not None:
        check_devices(config, get_class(scene.attack.trained_by))
        scene.attack.prepare(VictimWorkshop(config, scene, obtain_victim))
        plan = scene.attack.training_plan(config.training.epochs)
    if stage is None:
        before = fit_resumably(config, victim, make_training(config, scene), scene.data, plan)
    else:
        training = make_second_training(config, scene, stage)
        plan = {"max_epochs": stage.num_epochs(config.training.epochs)}
        before = fit_resumably(config, victim, training, scene.data.balanced(), plan)
        scene.model.load_state_dict(training.model.state_dict())
    if scene.attack is not None:
        scene.attack.eval()
    metrics, seconds = test_victim(config, scene, victim.folder), before + time.perf_counter() - started
    record = {"recipe": victim_recipe(config), "metrics": metrics, "seconds": seconds, "torch": torch.__version__}
    if first is not None:
        record["first_stage"] = first.folder.name  # with the seconds that it took
    victim.save(scene.model, scene.attack, record)
    victim.forget_checkpoint()
    log.info("victim %s: %s", victim.folder.name, ", ".join(f"{key} {100 * value:.1f} %" for key, value in metrics.items()))


def obtain_first_stage(config: DictConfig, scene: Scene) -> Victim:
    """The victim of the first stage alone, one of the store like any other; ``scene.model`` has its weights afterwards."""
    first = config.copy()
    first.loss.second_stage = None
    assert scene.loss is not None
    return obtain_victim(first, replace(scene, loss=scene.loss.alone()))[0]


def make_training(config: DictConfig, scene: Scene) -> PoisonedTraining:
    """The module that trains the victim: the attack's own where it has one; of imbalanced data, one that watches rare classes."""
    target, objects = Attack.trained_by if scene.attack is None else scene.attack.trained_by, {}
    if (config.get("imbalance") or {}).get("_target_") is not None and target == Attack.trained_by:
        target, objects = "marginclip.training.LongTailTraining", {"class_counts": scene.data.class_counts}
    settings = {key: config.training[key] for key in ("optimizer", "scheduler", "label_smoothing")}
    training: PoisonedTraining = instantiate(
        settings | {"_target_": target},
        scene.model,
        attack=scene.attack,
        loss=scene.loss,
        seed=config.seed,
        cuda_graphs=config.trainer.cuda_graphs,
        key="training",
        **objects,
    )
    return training


def make_second_training(config: DictConfig, scene: Scene, stage: SecondStage) -> PoisonedTraining:
    """The module that trains the last layer of a copy of ``scene.model``, with the optimizer of the first stage at its own rate."""
    counts = scene.data.class_counts
    settings = {
        "_target_": "marginclip.training.HeadTraining",
        "optimizer": {**config.training.optimizer, "lr": stage.learning_rate},
        "scheduler": {"_target_": "marginclip.training.cosine_to_zero", "_partial_": True},
    }
    training: PoisonedTraining = instantiate(
        settings, copy.deepcopy(stage.loss.adapt(scene.model, counts)), attack=scene.attack, loss=stage.loss, class_counts=counts,
        seed=config.seed, cuda_graphs=config.trainer.cuda_graphs, key="loss.second_stage",
    )  # fmt: skip
    return training


def test_victim(config: DictConfig, scene: Scene, folder: Path) -> dict[str, float]:
    """ACC and, under an attack, ASR and PACC of the model as it is, on the evaluation set."""
    evaluation = Evaluation({"none": scene.model})
    trainer = build_trainer(config, folder, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(evaluation, scene.data, verbose=False)
    return evaluation.results()["none"]
