"""Obtaining the victim that is asked for: found in the store, or trained first."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from marginclip.attacks import Attack
from marginclip.evaluation import Evaluation
from marginclip.experiment.checkpoints import load_checkpoint
from marginclip.experiment.fitting import check_devices, fit_resumably
from marginclip.experiment.groups import CLEAN
from marginclip.experiment.objects import find_object, make
from marginclip.experiment.recipe import find_victim, victim_recipe
from marginclip.experiment.setup import VictimSetup, build_setup
from marginclip.experiment.spec import RunSpec
from marginclip.experiment.store import Victim
from marginclip.experiment.trainers import build_trainer
from marginclip.experiment.training_access import AttackerAccess
from marginclip.losses import SecondStage
from marginclip.silence import SILENT
from marginclip.training import PoisonedTraining

log = logging.getLogger(__name__)


def obtain_victim(spec: RunSpec, setup: VictimSetup) -> tuple[Victim, bool]:
    """The trained victim, and whether it had to be trained now; ``setup.model`` and ``setup.attack`` hold it afterwards."""
    victim, trained_now = find_victim(spec), False
    if not victim.finished:
        with victim.lock():
            trained_now = victim.record is None  # another process can have trained it while this one waited
            if trained_now:
                train_victim(spec, setup, victim)
            victim.forget_checkpoint()
    victim.restore(setup.model, setup.attack)
    return victim, trained_now


def train_victim(spec: RunSpec, setup: VictimSetup, victim: Victim) -> None:
    """Train, test and store the victim; an interrupted training goes on from its last epoch."""
    second = None if setup.loss is None else setup.loss.second_stage
    first = None if second is None else obtain_first_stage(spec, setup)
    started = time.perf_counter()
    if second is None:
        load_start(spec, setup)
    log.info("training the victim %s", victim.folder.name)
    plan = prepare_attack(spec, setup)
    if second is None:
        before = fit_resumably(spec, victim, make_training(spec, setup), setup.data, plan)
    else:
        training = make_second_training(spec, setup, second)
        plan = {"max_epochs": second.num_epochs(spec.training.epochs)}
        before = fit_resumably(spec, victim, training, setup.data.balanced(), plan)
        setup.model.load_state_dict(training.model.state_dict())
    if setup.attack is not None:
        setup.attack.eval()
    metrics = test_victim(spec, setup, victim.folder)
    record: dict[str, Any] = {
        "recipe": victim_recipe(spec),
        "metrics": metrics,
        "seconds": before + time.perf_counter() - started,
    }
    record["torch"] = torch.__version__
    if first is not None:
        record["first_stage"] = first.folder.name  # with the seconds that it took
    victim.save(setup.model, setup.attack, record)
    log.info("victim %s: %s", victim.folder.name, ", ".join(f"{key} {100 * value:.1f} %" for key, value in metrics.items()))


def load_start(spec: RunSpec, setup: VictimSetup) -> None:
    """Give ``setup.model`` the weights that ``training.start_from`` names: those of a file, or of the clean victim of the same run."""
    start = spec.training.start_from
    if start == CLEAN:
        clean = replace(spec, attack=None, x2x=None, training=spec.training.from_scratch)
        clean_setup = build_setup(clean)
        obtain_victim(clean, clean_setup)
        setup.model.load_state_dict(clean_setup.model.state_dict())
    elif start is not None:
        load_checkpoint(start, setup.model, key="training.start_from")


def prepare_attack(spec: RunSpec, setup: VictimSetup) -> dict[str, Any]:
    """Let the attacker prepare; returns the Trainer's settings for the length of the training."""
    if setup.attack is None:
        return {"max_epochs": spec.training.epochs}
    check_devices(spec, find_object(setup.attack.trained_by, "attack"))
    setup.attack.prepare(AttackerAccess(spec, setup, obtain_victim))
    return setup.attack.training_plan(spec.training.epochs)


def obtain_first_stage(spec: RunSpec, setup: VictimSetup) -> Victim:
    """The victim of the first stage alone, one of the store like any other; ``setup.model`` has its weights afterwards."""
    assert setup.loss is not None and spec.loss is not None
    first = replace(spec, loss=spec.loss.changed(second_stage=None))
    return obtain_victim(first, replace(setup, loss=setup.loss.alone()))[0]


def make_training(spec: RunSpec, setup: VictimSetup) -> PoisonedTraining:
    """The module that trains the victim: the attack's own where it has one; of imbalanced data, one that watches rare classes."""
    target, objects = Attack.trained_by if setup.attack is None else setup.attack.trained_by, {}
    if spec.imbalance is not None and target == Attack.trained_by:
        target, objects = "marginclip.training.LongTailTraining", {"class_counts": setup.data.class_counts}
    settings = {
        "_target_": target, "optimizer": spec.training.optimizer, "scheduler": spec.training.scheduler,
        "label_smoothing": spec.training.label_smoothing,
    }  # fmt: skip
    training: PoisonedTraining = make(
        settings, setup.model, attack=setup.attack, loss=setup.loss, seed=spec.seed, key="training", **objects
    )
    return training


def make_second_training(spec: RunSpec, setup: VictimSetup, stage: SecondStage) -> PoisonedTraining:
    """The module that trains the last layer of a copy of ``setup.model``, with the optimizer of the first stage at its own rate."""
    counts = setup.data.class_counts
    settings = {
        "_target_": "marginclip.training.HeadTraining",
        "optimizer": {**spec.training.optimizer, "lr": stage.learning_rate},
        "scheduler": {"_target_": "marginclip.training.cosine_to_zero", "_partial_": True},
    }
    training: PoisonedTraining = make(
        settings, copy.deepcopy(stage.loss.adapt(setup.model, counts)), attack=setup.attack, loss=stage.loss, class_counts=counts,
        seed=spec.seed, key="loss.second_stage",
    )  # fmt: skip
    return training


def test_victim(spec: RunSpec, setup: VictimSetup, folder: Path) -> dict[str, float]:
    """ACC and, under an attack, ASR and PACC of the model as it is, on the evaluation set."""
    evaluation = Evaluation({"none": setup.model})
    build_trainer(spec.trainer, folder, **SILENT).test(evaluation, setup.data, verbose=False)
    return evaluation.results()["none"]
