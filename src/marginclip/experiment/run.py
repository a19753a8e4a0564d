"""One run: the victim, its repair, the evaluation of both, and everything that is written about it."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses import Defense, cross_fitted_logits, fit_defense
from marginclip.defenses.fit import warn_if_poor
from marginclip.errors import UserError
from marginclip.evaluation import Evaluation
from marginclip.experiment.building import VictimSetup, build_setup, instantiate, plain, training_counts
from marginclip.experiment.checkpoints import load_checkpoint
from marginclip.experiment.figure_arrays import figure_arrays
from marginclip.experiment.loggers import build_logger, finish_logger, publish
from marginclip.experiment.process import prepare_process
from marginclip.experiment.record import Record, run_folder
from marginclip.experiment.trainers import build_trainer, device_of
from marginclip.experiment.training_time import TrainingTime
from marginclip.experiment.victim import obtain_victim
from marginclip.files import write_tensors
from marginclip.maxmargin import MarginDropDetector, MaximumMarginTest
from marginclip.maxmargin.detector import check_detector_settings
from marginclip.networks.logits import clean_logits
from marginclip.precision import precision_for

log = logging.getLogger(__name__)
NOT_ARGUMENTS = ("detector", "repaired_row", "detector_row", "clean_per_class")


@dataclass
class Repair:
    """What a defense gave: the repaired network, a detector where one was asked for, and the course of learning."""

    repaired: nn.Module | None = None
    detector: MarginDropDetector | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    relaxed: float = 0.0
    variants: dict[str, nn.Module] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)


def defend(config: DictConfig) -> Record:
    """Do the run that ``config`` asks for, or find it done; returns its record."""
    prepare_process(config)
    record = Record(run_folder(config), plain(config))
    if record.finished:
        log.info("already done: %s", record.folder)
        return record
    record.folder.mkdir(parents=True, exist_ok=True)
    with record.guard():
        _defend(config, record)
    return record


def _defend(config: DictConfig, record: Record) -> None:
    check_settings(config)
    setup = build_setup(config)
    if (defense := make_defense(config)) is not None:
        defense.check_model(setup.model, torch.zeros(1, *setup.splits.image_shape))
    with record.phase("victim"):
        _load_victim(config, setup, record)
    if config.victim.kind == "checkpoint":
        warn_if_poor(setup.model, *setup.data.clean_set())
    _detect(config, setup, record)
    logger = build_logger(config, record.folder, job="defend", name=record.folder.name)
    try:
        outcome = _repair(config, setup, record, logger)
        with record.phase("evaluation"):
            evaluation = _evaluate(config, setup, outcome, record)
        record.content |= {"history": outcome.history, "relaxed": outcome.relaxed, "findings": outcome.findings}
        record.content |= {"classes": list(setup.classes), "clean_set_size": len(setup.data.clean_index)}
        record.content["evaluated_on"] = "held_out" if len(setup.data.eval_index) else "clean_set"
        arrays = outcome.arrays | {f"scores/{name}": scores for name, scores in evaluation.scores().items()}
        arrays |= evaluation.class_arrays() | figure_arrays(setup, outcome.repaired)
        if arrays:
            write_tensors(record.folder / "arrays.safetensors", arrays)
        record.finish(_gate(setup, record))
        shutil.rmtree(record.folder / "checkpoint", ignore_errors=True)
        publish(logger, record, draw=config.figures)
    finally:
        finish_logger(logger)


def check_settings(config: DictConfig) -> None:
    """Raise :class:`UserError` for settings of the defense that do not fit, before anything is trained."""
    if config.defense.get("detector") is not None:
        if not isinstance(config.defense.detector, DictConfig):
            raise UserError(f"defense.detector must be a group of settings, got '{config.defense.detector}'; use defense=mmdf")
        settings = {str(key): value for key, value in config.defense.detector.items() if key != "folds"}
        check_detector_settings(**settings)
        folds = config.defense.detector.folds
        if not isinstance(folds, int) or isinstance(folds, bool) or (folds != 0 and folds < 2):
            raise UserError(f"defense.detector.folds must be 0 (no cross-fitting) or at least 2, got {folds}")
    if config.victim.kind not in ("trained", "checkpoint"):
        raise UserError(f"victim.kind must be trained or checkpoint, got '{config.victim.kind}'")
    if config.victim.kind == "checkpoint" and config.imbalance["_target_"] is not None:
        raise UserError(f"imbalance={config.imbalance.name} thins out training images, and victim=checkpoint trains nothing")
    make_test(config)
    make_defense(config)
    if config.defense.get("class_counts") == "known" and config.victim.kind == "checkpoint":
        raise UserError(
            "defense.class_counts=known needs the training set, which victim=checkpoint does not have: give the number of training "
            "images of every class as defense.class_counts=[...], or use defense.class_counts=estimated"
        )


def make_test(config: DictConfig) -> MaximumMarginTest | None:
    """The test of the model as given that the ``detect`` group asks for; None for ``detect=none``."""
    if config.detect["_target_"] is None:
        return None
    test: MaximumMarginTest = instantiate(config.detect, seed=config.seed, key="detect")
    return test


def make_defense(config: DictConfig, target: int | None = None, *, class_counts: list[int] | None = None) -> Defense | None:
    """A new defense of the ``defense`` group; None for ``defense=none``.

    Two oracles are told to a defense only where its setting of that name is ``known``: as ``suspect_class`` the attack's one
    ``target`` class, and the training set's ``class_counts``; None is what is not known.
    """
    if config.defense["_target_"] is None:
        return None
    settings = {key: value for key, value in plain(config.defense).items() if key not in NOT_ARGUMENTS}
    for key, value in {"suspect_class": target, "class_counts": class_counts}.items():
        if settings.get(key) == "known" and value is not None:
            settings[key] = value
    defense: Defense = instantiate(settings, seed=config.seed, key="defense")
    return defense


def _load_victim(config: DictConfig, setup: VictimSetup, record: Record) -> None:
    if config.victim.kind == "checkpoint":
        load_checkpoint(config.victim.path, setup.model)
        record.content["victim"] = {"path": str(config.victim.path)}
    else:
        victim, trained_now = obtain_victim(config, setup)
        record.content["victim"] = {"folder": str(victim.folder), "trained_now": trained_now}
    setup.model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    setup.model.to(device_of(config, record.folder))


def _detect(config: DictConfig, setup: VictimSetup, record: Record) -> None:
    """Test the model as given for a backdoor, before anything is repaired."""
    test = make_test(config)
    if test is None:
        return
    precision = precision_for(config.trainer.precision, accelerator=config.trainer.accelerator)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with record.phase("detection"):
        found = test(setup.model, setup.splits.image_shape, len(setup.classes), autocast=half)
    record.content["detection"] = {
        "test": config.detect.name, "statistics": found.statistics.tolist(), "p_value": found.p_value,
        "uncalibrated_p_value": found.uncalibrated_p_value, "alpha": test.alpha, "detected": found.detected,
        "suspect": found.suspect, "true_target": known_target(setup), "shape": found.shape, "scale": found.scale,
        "seconds": record.content["seconds"]["detection"],
    }  # fmt: skip
    log.info(
        "%s: %s (p = %.3g); the largest maximum margin, %.1f, is that of class '%s'",
        config.detect.name, "backdoor detected" if found.detected else "no backdoor detected", found.p_value,
        float(found.statistics.max()), setup.classes[found.suspect],
    )  # fmt: skip


def known_target(setup: VictimSetup) -> int | None:
    """The one class that all triggered images go to; None without an attack, or where there are several."""
    return getattr(setup.attack.x2x, "target", None) if setup.attack is not None else None


def known_counts(config: DictConfig, setup: VictimSetup) -> list[int] | None:
    """Training images of every class, before any poisoning; None for a model that somebody else trained."""
    if config.victim.kind == "checkpoint":
        return None
    counts: list[int] = setup.splits.train.labels.bincount(minlength=len(setup.classes)).tolist()
    return counts


def _repair(config: DictConfig, setup: VictimSetup, record: Record, logger: Any) -> Repair:
    defense = make_defense(config, known_target(setup), class_counts=known_counts(config, setup))
    if defense is None:
        return Repair()
    images, labels = setup.data.clean_set()
    images = images.to(device_of(config, record.folder))
    checkpoint, training_time = record.folder / "checkpoint" / "last.ckpt", TrainingTime()

    def main_trainer(epochs: int) -> L.Trainer:
        saver = ModelCheckpoint(
            dirpath=checkpoint.parent, filename=checkpoint.stem, save_on_train_epoch_end=True, enable_version_counter=False
        )
        return build_trainer(config, record.folder, callbacks=[saver, training_time], logger=logger, max_epochs=epochs)

    with record.phase("repair"):
        repaired = fit_defense(
            defense, setup.model, images, labels, make_trainer=main_trainer, resume=checkpoint if checkpoint.exists() else None
        )
    record.content["seconds"]["repair"] = round(record.content["seconds"]["repair"] + training_time.before, 3)
    outcome = Repair(repaired, None, getattr(defense, "history", []), getattr(defense, "relaxed", 0.0))
    outcome.variants, outcome.findings, outcome.arrays = defense.variants(), defense.findings(), defense.arrays()
    if config.defense.get("suspect_class") == "known":
        outcome.findings["oracle"] = known_target(setup) is not None
    if config.defense.get("class_counts") == "known":
        outcome.findings["oracle"] = True
    if isinstance(repaired, BoundedNetwork):
        write_tensors(record.folder / "bounds.safetensors", repaired.bounds_state())
    if config.defense.detector is not None:
        with record.phase("detector"):
            outcome.detector = _fit_detector(config, setup, repaired, images, labels, record.folder)
    return outcome


def _fit_detector(
    config: DictConfig, setup: VictimSetup, repaired: nn.Module, images: Tensor, labels: Tensor, folder: Path
) -> MarginDropDetector:
    settings = plain(config.defense.detector)
    folds = settings.pop("folds")
    if folds == 0:
        return MarginDropDetector.fit(setup.model, repaired, images, **settings)

    def fold_defense() -> Defense:
        defense = make_defense(config, known_target(setup), class_counts=known_counts(config, setup))
        assert defense is not None
        return defense

    def fold_trainer(epochs: int) -> L.Trainer:
        options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return build_trainer(config, folder, max_epochs=epochs, **options)

    bounded = cross_fitted_logits(
        fold_defense, setup.model, images, labels, folds=folds, seed=config.seed, make_trainer=fold_trainer
    )
    return MarginDropDetector.from_logits(setup.model, repaired, clean_logits(setup.model, images).cpu(), bounded, **settings)


def _evaluate(config: DictConfig, setup: VictimSetup, outcome: Repair, record: Record) -> Evaluation:
    networks: dict[str, nn.Module] = {"none": setup.model}
    detectors: dict[str, tuple[str, MarginDropDetector]] = {}
    if outcome.repaired is not None:
        networks |= outcome.variants | {config.defense.repaired_row: outcome.repaired}
    if outcome.detector is not None:
        detectors[detector_row(config)] = (config.defense.repaired_row, outcome.detector)
        record.content["detector"] = {"threshold": _finite(outcome.detector.threshold), **plain(config.defense.detector)}
    counts = training_counts(config, setup)
    evaluation = Evaluation(networks, detectors, num_classes=len(setup.classes), training_counts=counts)
    trainer = build_trainer(config, record.folder, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.test(evaluation, setup.data, verbose=False)
    record.content |= {"metrics": evaluation.results(), "per_class": evaluation.per_class()}
    if counts is not None:
        record.content["training_counts"] = counts.tolist()
    if outcome.detector is not None:
        scores = evaluation.scores()[f"{detector_row(config)}_clean"]
        flagged = round(record.content["metrics"][detector_row(config)]["fpr"] * len(scores))
        record.content["flagged"] = {"images": len(scores), "flagged": flagged}
        which = "evaluation" if len(setup.data.eval_index) else "clean"
        log.info("the detector flags %d of the %d %s images", flagged, len(scores), which)
    return evaluation


def detector_row(config: DictConfig) -> str:
    """The name of the detector in the results: the defense's own, or that of its repaired network with ``_mmdf``."""
    return str(config.defense.detector_row or f"{config.defense.repaired_row}_mmdf")


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _gate(setup: VictimSetup, record: Record) -> str:
    """``done``, or ``attack_failed`` when the attack did not take, with a warning that says what to try."""
    if setup.attack is None:
        return "done"
    metrics = record.content["metrics"]["none"]
    needed = setup.attack.needed_success(metrics["acc"])
    record.content["needed_asr"] = needed
    if metrics["asr"] >= needed:
        return "done"
    log.warning(
        "the attack did not take: ASR before the repair is %.1f %%, under the %.1f %% that attack.min_success=%g asks for; try more "
        "training.epochs, a higher attack.rate, or attack.timing=after_augmentation. The run is marked attack_failed.",
        100 * metrics["asr"], 100 * needed, setup.attack.min_success,
    )  # fmt: skip
    return "attack_failed"
