"""``marginclip audit`` and ``marginclip repair``: a checkpoint and a folder of clean images in, a verdict or an artefact out."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from marginclip.data.images import read_images
from marginclip.errors import UserError, require
from marginclip.experiment.groups import Settings
from marginclip.experiment.process import prepare_process
from marginclip.experiment.setup import VictimSetup, build_setup
from marginclip.experiment.spec import RunSpec
from marginclip.experiment.stages import load_model, make_methods
from marginclip.experiment.trainers import build_trainer, device_of
from marginclip.files import write_json
from marginclip.service import Artefact, Audit, audit
from marginclip.service.scan import image_files
from marginclip.service.verdict import FEW_IMAGES
from marginclip.silence import SILENT

log = logging.getLogger(__name__)


def audit_model(spec: RunSpec, *, output: str, images_suspect: str | None, json: bool) -> tuple[bool, str]:
    """Audit the model and write ``audit.html`` and ``audit.json`` into ``output``; whether something was found, and what to print."""
    methods, setup, images, labels = _given(spec)
    suspects = None if images_suspect is None else _unlabelled(images_suspect, setup)

    def tell(part: str) -> None:
        print(f"{part} ...", file=sys.stderr, flush=True)

    found = audit(
        setup.model, images, labels, classes=setup.classes, suspect_images=suspects, test=methods.test, mmac=methods.defense,
        seed=spec.seed, make_trainer=_trainers(spec), progress=tell,
    )  # fmt: skip
    content = found.to_dict()
    write_json(Path(output) / "audit.json", content)
    page = found.write_html(Path(output) / "audit.html")
    return found.verdict.suspicious, _as_json(content) if json else _in_words(found, page)


def repair_model(spec: RunSpec, *, output: str, tolerance: float, json: bool) -> str:
    """Repair the model and write the artefact into ``output``; returns what to print."""
    require(
        isinstance(tolerance, (int, float)) and tolerance >= 0,
        f"tolerance must be points of accuracy from 0 up, got {tolerance!r}",
    )
    methods, setup, images, labels = _given(spec)
    if methods.defense is None or spec.defense is None:
        raise UserError("marginclip repair needs a defense that bounds activations: defense=mmdf, mmac or mmom")
    detector = spec.defense.detector
    artefact = Artefact.fit(
        setup.model, images, labels, defense=methods.defense, classes=setup.classes, seed=spec.seed, make_trainer=_trainers(spec),
        folds=2 if detector is None or detector.folds == 0 else detector.folds, detector=None if detector is None else detector.settings,
        model_settings=_with_whole_path(spec.model.settings), model_path=str(Path(str(spec.weights)).resolve()),
    )  # fmt: skip
    artefact.save(output)
    before, after = (100 * artefact.facts[key] for key in ("accuracy", "repaired_accuracy"))
    if before - after > tolerance:
        log.warning(
            "the repair costs %.1f points of accuracy on images that it has not seen, more than tolerance=%g; with more clean images "
            "it costs less, and defense.lambda_.min_agreement=0.995 keeps more of the accuracy and less of the repair",
            before - after, tolerance,
        )  # fmt: skip
    facts = {"artefact": str(output), "accuracy": before, "repaired_accuracy": after, "threshold": artefact.detector.threshold}
    if json:
        return _as_json(facts | {"threshold": None if facts["threshold"] == float("inf") else facts["threshold"]})
    return (
        f"accuracy on clean images {before:.1f} %, of repairs that had not seen them {after:.1f} %\n"
        f"next: marginclip scan {output} IMAGES\n{output}"
    )


def _with_whole_path(settings: Settings) -> dict[str, Any]:
    """The settings of a model, its ``path`` one that is found from every folder."""
    whole = dict(settings)
    return whole | ({"path": str(Path(whole["path"]).resolve())} if isinstance(whole.get("path"), str) else {})


def _given(spec: RunSpec) -> tuple[Any, VictimSetup, Tensor, Tensor]:
    """The methods, the setup with the model loaded, and the clean images on its device."""
    require(
        spec.from_checkpoint,
        "audit and repair take a model that exists: victim.path=FILE, or a model that brings its weights (and no victim=trained)",
    )
    prepare_process(spec.trainer.threads)
    methods = make_methods(spec)
    setup = build_setup(spec)
    if methods.defense is not None:
        methods.defense.check_model(setup.model, torch.zeros(1, *setup.splits.image_shape))
    load_model(spec, setup)
    images, labels = setup.data.clean_set()
    fewest = int(labels.bincount(minlength=len(setup.classes)).min())
    if fewest < FEW_IMAGES:
        log.warning(
            "the smallest class has %d clean images: with so few the repair costs more accuracy and the detector knows less of what is "
            "usual; about 50 of every class are what all was measured with", fewest,
        )  # fmt: skip
    return methods, setup, images.to(device_of(spec.trainer)), labels


def _trainers(spec: RunSpec) -> Any:
    def make_trainer(epochs: int) -> L.Trainer:
        return build_trainer(spec.trainer, max_epochs=epochs, **SILENT)

    return make_trainer


def _unlabelled(folder: str, setup: VictimSetup) -> Tensor:
    """The images of a folder as (N, C, H, W) in [0, 1], in the order of their names."""
    require(Path(folder).is_dir(), f"images_suspect='{folder}' is not a folder")
    paths = sorted(image_files([folder]))
    require(bool(paths), f"images_suspect='{folder}' holds no images")
    channels, height, _ = setup.splits.image_shape
    return read_images(paths, height, strict=False, grey=channels == 1).float() / 255


def _in_words(found: Audit, page: Path) -> str:
    verdict = found.verdict
    lines = [verdict.headline, f"how sure: {verdict.confidence}", "", *verdict.reasons]
    for title, part in (
        ("speaks against it", verdict.against),
        ("not tested", verdict.not_tested),
        ("what to do", verdict.advice),
    ):
        lines += ["", f"{title}:", *(f"- {line}" for line in part)] if part else []
    return "\n".join([*lines, "", str(page)])


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, allow_nan=False)
