"""The stages of a run: obtain the model, test it for a backdoor, repair it, fit a detector, evaluate all."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from marginclip.defenses import Defense, RepairResult, cross_fitted_logits
from marginclip.evaluation import Evaluation
from marginclip.experiment.checkpoints import load_checkpoint
from marginclip.experiment.extremes import extreme_images
from marginclip.experiment.fitting import checkpoint_saver
from marginclip.experiment.progress import tracked
from marginclip.experiment.setup import VictimSetup
from marginclip.experiment.spec import RunSpec
from marginclip.experiment.trainers import build_trainer, device_of
from marginclip.experiment.training_time import TrainingTime
from marginclip.experiment.victim import obtain_victim
from marginclip.maxmargin import MarginDropDetector, MaximumMarginTest
from marginclip.networks.layout import channels_last
from marginclip.networks.logits import clean_logits, warn_if_poor
from marginclip.precision import precision_for
from marginclip.record import DetectionTest, Flagged, Row, RunRecord, VictimSource
from marginclip.silence import SILENT

log = logging.getLogger(__name__)
# Beside the papers' MMDF: the end of the row's name -> how its label goes on, and the detector's settings.
OUR_WAYS = {
    "repaired": ("repair decides", {"rule": "repaired"}),
    "both": ("both statistics", {"statistic": "both"}),
}
HALF_PRECISION = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Methods:
    """The objects that a run is done with, made once: a test of the model as given, and a defense."""

    test: MaximumMarginTest | None
    defense: Defense | None


def make_methods(spec: RunSpec) -> Methods:
    """The methods that are asked for. Raises :class:`UserError` for their settings, before any data is loaded."""
    test = None if spec.detect is None else spec.detect.make(seed=spec.seed)
    return Methods(test, None if spec.defense is None else spec.defense.choice.make(seed=spec.seed))


def load_model(spec: RunSpec, setup: VictimSetup) -> VictimSource:
    """Give ``setup.model`` the weights of the victim, which is trained first where it does not exist, or of the checkpoint.

    A model that brings its own weights keeps them where no checkpoint is named.
    """
    if spec.from_checkpoint:
        if spec.checkpoint is not None or getattr(setup.model, "loaded_from", None) is None:
            load_checkpoint(spec.checkpoint, setup.model)
        source = VictimSource(path=str(spec.weights))
    else:
        victim, trained_now = obtain_victim(spec, setup)
        source = VictimSource(folder=str(victim.folder), trained_now=trained_now)
    channels_last(setup.model.eval())
    setup.model.to(device_of(spec.trainer))
    if spec.from_checkpoint:
        warn_if_poor(setup.model, *setup.data.clean_set())
    return source


def run_test(spec: RunSpec, setup: VictimSetup, test: MaximumMarginTest, record: RunRecord) -> None:
    """Test the model as given for a backdoor, and note what was found."""
    assert spec.detect is not None
    half = HALF_PRECISION.get(precision_for(spec.trainer.precision, accelerator=spec.trainer.accelerator))
    shown = {"track": tracked(spec.detect.name)} if isinstance(test, MaximumMarginTest) else {}
    found = test(setup.model, setup.splits.image_shape, len(setup.classes), autocast=half, **shown)
    record.detection = DetectionTest(
        test=spec.detect.name, statistics=found.statistics.tolist(), p_value=found.p_value,
        uncalibrated_p_value=found.uncalibrated_p_value, alpha=test.alpha, detected=found.detected, suspect=found.suspect,
        true_target=setup.target_class, shape=found.shape, scale=found.scale,
    )  # fmt: skip
    log.info(
        "%s: %s (p = %.3g); the largest maximum margin, %.1f, is that of class '%s'",
        spec.detect.name, "backdoor detected" if found.detected else "no backdoor detected", found.p_value,
        float(found.statistics.max()), setup.classes[found.suspect],
    )  # fmt: skip


def tell_oracles(spec: RunSpec, setup: VictimSetup, defense: Defense) -> None:
    """Tell the defense what it asks for by the word ``known``: the attack's target class, the training set's counts."""
    defense.tell(suspect_class=setup.target_class, class_counts=None if spec.from_checkpoint else setup.training_counts)


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint that an interrupted repair goes on from."""
    return folder / "checkpoint" / "last.ckpt"


def run_repair(spec: RunSpec, setup: VictimSetup, defense: Defense, record: RunRecord, logger: Any) -> RepairResult:
    """The repair, going on where it was interrupted."""
    images, labels = setup.data.clean_set()
    checkpoint, training_time = checkpoint_of(record.folder), TrainingTime()

    def make_trainer(epochs: int) -> L.Trainer:
        callbacks = [checkpoint_saver(checkpoint), training_time]
        return build_trainer(
            spec.trainer, record.folder, shown=defense.label, callbacks=callbacks, logger=logger, max_epochs=epochs
        )

    result = defense.fit(
        setup.model,
        images.to(device_of(spec.trainer)),
        labels,
        make_trainer=make_trainer,
        resume=checkpoint if checkpoint.exists() else None,
    )
    record.seconds["repair"] = training_time.before
    record.history, record.findings = result.history, dict(result.findings)
    if defense.oracle_told is not None:
        record.findings["oracle"] = defense.oracle_told
    return result


def fit_detector(spec: RunSpec, setup: VictimSetup, defense: Defense, repaired: nn.Module) -> MarginDropDetector | None:
    """The detector that compares the model with its repair; None where none is asked for."""
    if spec.defense is None or spec.defense.detector is None:
        return None
    images, labels = setup.data.clean_set()
    images = images.to(device_of(spec.trainer))
    detector = spec.defense.detector
    if detector.folds == 0:
        return MarginDropDetector.fit(setup.model, repaired, images, **detector.settings)
    bounded = cross_fitted_logits(
        defense, setup.model, images, labels, folds=detector.folds, seed=spec.seed,
        make_trainer=lambda epochs: build_trainer(spec.trainer, shown="repair without a fold", max_epochs=epochs, **SILENT),
        track=tracked("detector", "folds"),
    )  # fmt: skip
    logits = clean_logits(setup.model, images).cpu()
    return MarginDropDetector.from_logits(setup.model, repaired, logits, bounded, **detector.settings)


def evaluate(
    spec: RunSpec,
    setup: VictimSetup,
    defense: Defense | None,
    result: RepairResult | None,
    detector: MarginDropDetector | None,
    record: RunRecord,
) -> dict[str, Tensor]:
    """Measure the model as given, its repair and the detector; returns what figures are drawn from beside the record."""
    networks: dict[str, nn.Module] = {"none": setup.model}
    detectors: dict[str, tuple[str, MarginDropDetector]] = {}
    record.rows = {"none": Row(label="no defense")}
    if spec.defense is not None and defense is not None and result is not None:
        repaired_row, detector_row = spec.defense.repaired_row, spec.defense.named_detector_row
        networks |= {name: variant.network for name, variant in result.variants.items()} | {repaired_row: result.network}
        record.rows |= {name: Row(label=variant.label, phases=["repair"]) for name, variant in result.variants.items()}
        record.rows[repaired_row], record.repaired_row = Row(label=defense.label, phases=["repair"]), repaired_row
        if detector is not None:
            title, phases = _detector_label(spec, defense), ["repair", "detector"]
            detectors[detector_row] = (repaired_row, detector)
            record.rows[detector_row] = Row(label=title, phases=phases)
            if (detector.rule, detector.statistic) == ("paper", "drop"):  # our ways, beside the papers'
                for name, (words, changes) in OUR_WAYS.items():
                    detectors[f"{detector_row}_{name}"] = (repaired_row, detector.changed(**changes))
                    record.rows[f"{detector_row}_{name}"] = Row(label=f"{title}, {words}", phases=phases)
    counts = None if spec.imbalance is None else setup.data.class_counts
    evaluation = Evaluation(networks, detectors, num_classes=len(setup.classes), training_counts=counts)
    build_trainer(spec.trainer, record.folder, **SILENT).test(evaluation, setup.data, verbose=False)
    record.metrics = {row: dict(values) for row, values in evaluation.results().items()}
    record.per_class = evaluation.per_class()
    record.training_counts = None if counts is None else counts.tolist()
    scores = {}
    if detector is not None and spec.defense is not None:
        name = spec.defense.named_detector_row
        _note_detector(spec, setup, name, detector, evaluation, record)
        scores = {f"scores/{name}_{kind}": values for kind, values in evaluation.scores(name).items()}
        # The scores and the threshold that are saved hold for rows of the same statistic alone.
        same = [row for row, (_, each) in detectors.items() if each.statistic == detector.statistic]
        scores |= {f"outcomes/{row}/{key}": codes for row in same for key, codes in evaluation.outcomes(row).items()}
        scores |= extreme_images(setup, name, evaluation.scores(name), evaluation.flagged_images(name))
    return (result.arrays if result is not None else {}) | scores | evaluation.class_arrays()


def attack_took(setup: VictimSetup, record: RunRecord) -> bool:
    """Whether the attack worked on the model as given, with a warning that says what to try where it did not."""
    if setup.attack is None:
        return True
    metrics = record.metrics["none"]
    accuracy, success = metrics["acc"], metrics["asr"]
    assert accuracy is not None and success is not None
    record.needed_asr = setup.attack.needed_success(accuracy)
    if success >= record.needed_asr:
        return True
    log.warning(
        "the attack did not take: ASR before the repair is %.1f %%, under the %.1f %% that attack.min_success=%g asks for; try more "
        "training.epochs, a higher attack.rate, or attack.timing=after_augmentation. The run is marked attack_failed.",
        100 * success, 100 * record.needed_asr, setup.attack.min_success,
    )  # fmt: skip
    return False


def _note_detector(
    spec: RunSpec, setup: VictimSetup, name: str, detector: MarginDropDetector, evaluation: Evaluation, record: RunRecord
) -> None:
    assert spec.defense is not None and spec.defense.detector is not None
    threshold = detector.threshold if abs(detector.threshold) < float("inf") else None
    record.detector = {"threshold": threshold, "folds": spec.defense.detector.folds, **spec.defense.detector.settings}
    scores, rate = evaluation.scores(name)["clean"], record.metrics[name]["fpr"]
    assert rate is not None
    record.flagged = Flagged(images=len(scores), flagged=round(rate * len(scores)))
    which = "evaluation" if len(setup.data.eval_index) else "clean"
    log.info("the detector flags %d of the %d %s images", record.flagged.flagged, len(scores), which)


def _detector_label(spec: RunSpec, defense: Defense) -> str:
    """MMDF is the detector of MMAC; with another defense it has that one's name in front."""
    assert spec.defense is not None
    return "MMDF" if spec.defense.named_detector_row == "mmdf" else f"{defense.label} + MMDF"
