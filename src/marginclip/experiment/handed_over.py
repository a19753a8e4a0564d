"""``marginclip audit`` and ``marginclip repair``: a checkpoint and a folder of clean images in, a verdict or an artefact out."""

from __future__ import annotations

import json
import logging
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from marginclip.data.images import read_images
from marginclip.defenses import MMAC, MMOM
from marginclip.defenses.clipping.passes import Passes, passes_with_folds
from marginclip.defenses.clipping.tolerance import check_tolerance
from marginclip.errors import UserError, require
from marginclip.experiment.groups import DetectorSpec, Settings
from marginclip.experiment.process import prepare_process
from marginclip.experiment.setup import VictimSetup, build_setup
from marginclip.experiment.spec import RunSpec
from marginclip.experiment.stages import Methods, load_model, make_methods
from marginclip.experiment.trainers import build_trainer, device_of
from marginclip.files import write_json
from marginclip.locks import locked
from marginclip.maxmargin import MaximumMarginTest
from marginclip.networks.memory import memory_budget, memory_limited_to
from marginclip.service import Artefact, Audit, audit
from marginclip.service.artefact import check_bounds
from marginclip.service.estimate import in_words, measure
from marginclip.service.reach import STARTS, STEPS, WARP_STEPS
from marginclip.service.scan import image_files
from marginclip.service.verdict import FEW_IMAGES, UNTESTED
from marginclip.silence import SILENT

log = logging.getLogger(__name__)
PIXEL_BYTES = 1 + 4 + 4  # as it is read, as it is computed with, and a copy of that


def audit_model(
    spec: RunSpec, *, output: str, images_suspect: str | None, json: bool, memory_gib: float | None = None
) -> tuple[bool, str]:
    """Audit the model and write ``audit.html`` and ``audit.json`` into ``output``; whether something was found, and what to print.

    ``memory_gib`` limits what a step keeps in memory; None: half of what is free.
    """
    with memory_limited_to(memory_gib):
        found = _audited(spec, images_suspect)
    content = found.to_dict()
    with locked(Path(output)):
        write_json(Path(output) / "audit.json", content)
        page = found.write_html(Path(output) / "audit.html")
    return found.verdict.suspicious, _as_json(content) if json else _in_words(found, page)


def _audited(spec: RunSpec, images_suspect: str | None) -> Audit:
    methods = make_methods(spec)
    mmac, test, detector = _parts_of_audit(spec, methods)
    setup, images, labels = _given(spec, methods)
    suspects = (
        None
        if images_suspect is None
        else _unlabelled(images_suspect, setup, strict=spec.dataset.choice.settings.get("size") is None)
    )

    def tell(part: str) -> None:
        _say(f"{part} ...")

    speed, classes = measure(setup.model, images), len(setup.classes)
    # Under the bounds one of the two once more: at most the warps, which are longer.
    reached = STARTS * (STEPS + 1 + 2 * (WARP_STEPS + 1))
    searched = Passes(backward=(test.starts * (test.steps + 1) + reached) * classes)
    usual, longest = (
        sum(
            (
                found
                for each in (mmac, MMOM())
                if (found := passes_with_folds(each, len(images), classes, detector.folds, longest=extra))
            ),
            searched,
        )
        for extra in (False, True)
    )
    _say(in_words(speed, usual, longest) + ", or less: MM-BD may end early")
    return audit(
        setup.model, images, labels, classes=setup.classes, suspect_images=suspects, test=test, mmac=mmac,
        detector=detector.settings, folds=detector.folds, seed=spec.seed, make_trainer=_trainers(spec, "learning"), progress=tell,
    )  # fmt: skip


def _parts_of_audit(spec: RunSpec, methods: Methods) -> tuple[MMAC, MaximumMarginTest, DetectorSpec]:
    """What the audit repairs, tests and looks at images with. Raises :class:`UserError`, before anything is read, for other ones."""
    defense, test = methods.defense, methods.test
    if spec.defense is None or not isinstance(defense, MMAC):
        name = "none" if spec.defense is None else spec.defense.choice.name
        raise UserError(f"marginclip audit repairs by MMAC: defense must be mmdf or mmac, got {name}")
    if not isinstance(test, MaximumMarginTest):
        name = "none" if spec.detect is None else spec.detect.name
        raise UserError(f"marginclip audit tests by MM-BD: detect must be mmbd, got {name}")
    detector = spec.defense.detector or DetectorSpec(statistic="both")
    _check_folds(detector, "an audit judges each image by a repair that never saw it")
    return defense, test, detector


def _check_folds(detector: DetectorSpec, reason: str) -> None:
    require(detector.folds >= 2, f"defense.detector.folds must be at least 2, got {detector.folds}: {reason}")


def repair_model(spec: RunSpec, *, output: str, tolerance: float | None, json: bool, memory_gib: float | None = None) -> str:
    """Repair the model and write the artefact into ``output``; returns what to print. ``memory_gib``: see :func:`audit_model`."""
    with memory_limited_to(memory_gib):
        artefact = _repaired(spec, tolerance)
    with locked(Path(output)):
        artefact.save(output)
    before, after = (100 * artefact.facts[key] for key in ("accuracy", "repaired_accuracy"))
    facts = {"artefact": str(output), "accuracy": before, "repaired_accuracy": after, "threshold": artefact.detector.threshold}
    if json:
        return _as_json(
            facts | {"threshold": None if facts["threshold"] == float("inf") else facts["threshold"]} | {"not_tested": UNTESTED}
        )
    return (
        f"accuracy on clean images {before:.1f} %, of repairs that had not seen them {after:.1f} %\n{UNTESTED}\n"
        f"next: marginclip scan {output} IMAGES\n{output}"
    )


def _repaired(spec: RunSpec, tolerance: float | None) -> Artefact:
    check_tolerance(tolerance)
    methods = make_methods(spec)
    if methods.defense is None or spec.defense is None:
        raise UserError("marginclip repair needs a defense that bounds activations: defense=mmdf, mmac or mmom")
    check_bounds(methods.defense)
    detector = spec.defense.detector
    if detector is not None:
        _check_folds(detector, "threshold and accuracy of an artefact come from repairs of parts of the clean images")
    folds = 2 if detector is None else detector.folds
    setup, images, labels = _given(spec, methods)
    usual, longest = (
        passes_with_folds(methods.defense, len(images), len(setup.classes), folds, longest=extra) for extra in (False, True)
    )
    if usual is not None:
        _say(in_words(measure(setup.model, images), usual, longest))
    return Artefact.fit(
        setup.model, images, labels, defense=methods.defense, classes=setup.classes, seed=spec.seed,
        make_trainer=_trainers(spec, methods.defense.label),
        folds=folds, detector=None if detector is None else detector.settings,
        model_settings=_with_whole_path(spec.model.settings), model_path=str(Path(str(spec.weights)).resolve()),
        tolerance=tolerance,
    )  # fmt: skip


def _with_whole_path(settings: Settings) -> dict[str, Any]:
    """The settings of a model, its ``path`` one that is found from every folder."""
    whole = dict(settings)
    return whole | ({"path": str(Path(whole["path"]).resolve())} if isinstance(whole.get("path"), str) else {})


def _given(spec: RunSpec, methods: Methods) -> tuple[VictimSetup, Tensor, Tensor]:
    """The setup with the model loaded, and the clean images on its device."""
    require(
        spec.from_checkpoint,
        "audit and repair take a model that exists: give victim.path=FILE, or a model that brings its weights, without victim=trained",
    )
    prepare_process(spec.trainer.threads)
    setup = build_setup(spec)
    if methods.defense is not None:
        methods.defense.check_model(setup.model, torch.zeros(1, *setup.splits.image_shape))
    load_model(spec, setup)
    images, labels = setup.data.clean_set()
    fewest = int(labels.bincount(minlength=len(setup.classes)).min())
    if fewest < FEW_IMAGES:
        log.warning(
            "the smallest class has %d clean images. With so few the repair costs more accuracy, and the detector knows less of what is "
            "usual. Our measurements have about 50 of every class. With mmac and mmdf defense.repeats=4 wins a part of it back", fewest,
        )  # fmt: skip
    most = int(labels.bincount(minlength=len(setup.classes)).max())
    if most > 2 * fewest:
        log.warning(
            "the classes have %d to %d clean images. Such an uneven set costs accuracy like a small one, and causes more false alarms than "
            "theta promises. Put as many images of every class into dataset.root", fewest, most,
        )  # fmt: skip
    return setup, images.to(device_of(spec.trainer)), labels


def _trainers(spec: RunSpec, shown: str) -> Any:
    """Makes Trainers of so many epochs whose progress is ``shown`` under a name."""

    def make_trainer(epochs: int) -> L.Trainer:
        return build_trainer(spec.trainer, max_epochs=epochs, shown=shown, **SILENT)

    return make_trainer


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _unlabelled(folder: str, setup: VictimSetup, *, strict: bool) -> Tensor:
    """The images of a folder as (N, C, H, W) in [0, 1], by name; ``strict`` refuses other sizes instead of scaling them."""
    require(Path(folder).is_dir(), f"images_suspect='{folder}' is not a folder")
    channels, height, width = setup.splits.image_shape
    most = max(1, memory_budget() // (channels * height * width * PIXEL_BYTES))
    paths = [file for file in islice(image_files([folder]), most + 1) if isinstance(file, str)]
    require(bool(paths), f"images_suspect='{folder}' holds no images")
    require(
        len(paths) <= most,
        f"images_suspect='{folder}' holds more than the {most} images that memory_gib allows for: use marginclip repair and scan",
    )
    return read_images(sorted(paths), height, strict=strict, grey=channels == 1).float() / 255


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
