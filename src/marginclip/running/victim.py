"""Finding the victim that a configuration asks for, training it first where it does not exist yet."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from marginclip.evaluation import Evaluation
from marginclip.running.build import Scene, build_trainer, instantiate, plain
from marginclip.running.fitting import fit_resumably, victim_store
from marginclip.running.quiet import quiet_lightning
from marginclip.running.record import named_parts
from marginclip.running.workshop import VictimWorkshop
from marginclip.training import PoisonedTraining
from marginclip.victims import Victim

log = logging.getLogger(__name__)


def victim_recipe(config: DictConfig) -> dict[str, Any]:
    """What a trained victim depends on, as plain containers."""
    groups = plain(config)
    recipe = {key: groups[key] for key in ("dataset", "attack", "x2x", "model", "training", "seed")}
    if (groups.get("imbalance") or {}).get("_target_") is not None:
        recipe["imbalance"] = groups["imbalance"]
    if "_target_" in recipe["attack"] and recipe["attack"]["_target_"].endswith("no_attack"):
        recipe["x2x"] = None
    if "defender" in recipe["attack"]:
        recipe["clean_order"] = groups["clean_order"]  # the attacker learns bounds on the defender's clean set
    return recipe | {"precision": groups["trainer"]["precision"]}


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
    started = time.perf_counter()
    log.info("training the victim %s", victim.folder.name)
    quiet_lightning()
    plan = {"max_epochs": config.training.epochs}
    if scene.attack is not None:
        scene.attack.prepare(VictimWorkshop(config, scene, obtain_victim))
        plan = scene.attack.training_plan(config.training.epochs)
    training: PoisonedTraining = instantiate(
        {key: config.training[key] for key in ("optimizer", "scheduler", "label_smoothing")}
        | {"_target_": "marginclip.training.PoisonedTraining" if scene.attack is None else scene.attack.trained_by},
        scene.model,
        attack=scene.attack,
        key="training",
    )
    fit_resumably(config, victim, training, scene.data, plan)
    if scene.attack is not None:
        scene.attack.eval()
    metrics, seconds = test_victim(config, scene, victim.folder), time.perf_counter() - started
    record = {"recipe": victim_recipe(config), "metrics": metrics, "seconds": seconds, "torch": torch.__version__}
    victim.save(scene.model, scene.attack, record)
    victim.forget_checkpoint()
    log.info("victim %s: %s", victim.folder.name, ", ".join(f"{key} {100 * value:.1f} %" for key, value in metrics.items()))


def test_victim(config: DictConfig, scene: Scene, folder: Path) -> dict[str, float]:
    """ACC and, under an attack, ASR and PACC of the model as it is, on the evaluation set."""
    evaluation = Evaluation({"none": scene.model})
    trainer = build_trainer(config, folder, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(evaluation, scene.data, verbose=False)
    return evaluation.results()["none"]
