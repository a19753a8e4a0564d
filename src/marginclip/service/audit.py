"""Auditing a model of somebody else: what it shows on a small clean set, and what that means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marginclip.clipping import activation_extremes
from marginclip.defenses import MMAC, MMOM, Defense, cross_fitted_logits
from marginclip.defenses.base import TrainerFactory
from marginclip.defenses.choosing.auto import Clock
from marginclip.defenses.choosing.evidence import compare
from marginclip.defenses.cross_fitting import check_folds
from marginclip.errors import require
from marginclip.maxmargin import MarginDropDetector, MaximumMargins, MaximumMarginTest
from marginclip.maxmargin.detector import check_settings
from marginclip.metrics import Reliability
from marginclip.networks.copies import own_copy
from marginclip.networks.logits import batched_logits, check_clean_set, check_images, class_numbers, clean_logits
from marginclip.service.reach import reach, warp_reach
from marginclip.service.verdict import Findings, Suspicious, Verdict, judge, stronger
from marginclip.silence import nested_trainers, silent_trainer

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Audit:
    """The outcome of :func:`audit`: the verdict, what it rests on, and what the report draws.

    Args:
        verdict: in words: its headline, how sure it is, the sentences of the report.
        found: the numbers that were counted.
        classes: the names of the classes.
        margins: the outcome of MM-BD.
        reached: the same for a few steps from clean images: how far each class can be reached.
        warped: the same for one small warp of clean images.
        under_bounds: the stronger of these two again, on the model under the bounds that MMAC learned.
        seconds: by part.
        tensors: ``images`` (K, C, H, W), the input of largest margin of each class; ``reliability`` (bins, 3); ``examples`` of the
            suspect class; ``flagged_images``, where images were given to look at.
        sites: by activation call, the largest clean activation and the bound of each map.
        suspicious: what the detector says of the images that were given to look at. None where none were.
    """

    verdict: Verdict
    found: Findings
    classes: tuple[str, ...]
    margins: MaximumMargins
    reached: MaximumMargins
    warped: MaximumMargins
    under_bounds: MaximumMargins
    seconds: Mapping[str, float]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    sites: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    suspicious: Suspicious | None = None

    def to_dict(self) -> dict[str, Any]:
        """All but pictures, as plain values: the content of ``audit.json``."""
        given = None if self.suspicious is None else asdict(self.suspicious)
        return {
            "verdict": asdict(self.verdict), "found": asdict(self.found), "classes": list(self.classes),
            "maximum_margins": _test(self.margins), "reach": _test(self.reached),
            "reach_by_warping": _test(self.warped), "reach_under_bounds": _test(self.under_bounds), "suspicious_images": given,
            "seconds": dict(self.seconds),
        }  # fmt: skip

    def write_html(self, path: str | Path) -> Path:
        """One page with the verdict and its figures, that needs nothing beside it."""
        from marginclip.service.page import write_page

        return write_page(self, Path(path))


def audit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    classes: tuple[str, ...] | None = None,
    suspect_images: Tensor | None = None,
    test: MaximumMarginTest | None = None,
    mmac: MMAC | None = None,
    mmom: Defense | None = None,
    detector: Mapping[str, Any] | None = None,
    folds: int = 2,
    seed: int = 0,
    make_trainer: TrainerFactory = silent_trainer,
    progress: Progress = lambda part: None,
) -> Audit:
    """Look for a backdoor and for the traces of imbalance in a model.

    Args:
        model: the classifier; it is not changed.
        images: clean images (N, C, H, W) in [0, 1], out of an attacker's reach, about 50 of every class.
        labels: their classes (N,), whole numbers.
        classes: the names of the classes, in the order of the logits. None: their numbers.
        suspect_images: images (M, C, H, W) from use, without labels: the detector says which of them it flags.
        test: the settings of MM-BD. None: the shipped ones.
        mmac: the repair against backdoors. None: the shipped settings.
        mmom: the repair of imbalance. None: the shipped settings.
        detector: settings of the detector that looks at ``suspect_images``, as for :meth:`Artefact.fit`.
        folds: parts of the clean set; images of one are decided by a repair that was learned from the others.
        seed: of everything that is drawn.
        make_trainer: makes the Lightning Trainer for a number of epochs.
        progress: is told the name of each part as it begins.

    Returns:
        The verdict and what it rests on.

    Raises:
        UserError: for a model or images that do not fit, for fewer than 3 classes, and for an ``mmac`` of another kind.
    """
    repair = MMAC(seed=seed) if mmac is None else mmac
    require(
        isinstance(repair, MMAC),
        f"an audit repairs by MMAC: mmac must be an MMAC, such as MMAC(steps=120), got {type(repair).__name__}",
    )
    settings = {"statistic": "both"} | dict(detector or {})
    check_settings(settings)
    logits = clean_logits(model, images).cpu()
    labels = class_numbers(labels)
    check_clean_set(images, labels, logits.shape[1])
    labels = labels.cpu()
    count = logits.shape[1]
    names = classes or tuple(str(number) for number in range(count))
    require(count >= 3, f"an audit compares each class with the others and needs at least 3 classes, got {count}")
    require(len(names) == count, f"the model gives logits of {count} classes, not of {len(names)}")
    _check_parts(labels, folds, names)
    if suspect_images is not None:
        check_images(suspect_images)
    clock, network = Clock(progress), own_copy(model)
    trainer = make_trainer(1)
    nested = nested_trainers(trainer)
    half = HALF.get(str(trainer.precision))
    network.to(trainer.strategy.root_device)
    shape = tuple(images.shape[1:])
    margins = clock.timed(
        "maximum margins", lambda: (test or MaximumMarginTest(seed=seed))(network, shape, count, autocast=half)
    )
    reached = clock.timed("reach of every class", lambda: reach(network, images, labels, seed=seed))
    warped = clock.timed("reach by warping", lambda: warp_reach(network, images, labels, seed=seed))
    closest = stronger(reached, warped)
    fitted = {}
    for name, defense in (("mmom", mmom or MMOM(seed=seed)), ("mmac", repair)):
        fitted[name] = clock.timed(
            f"{name} out of fold",
            lambda defense=defense: cross_fitted_logits(  # type: ignore[misc]
                defense, model, images, labels, folds=folds, seed=seed, make_trainer=nested
            ),
        )
    result = clock.timed("mmac", lambda: repair.fit(model, images, labels, make_trainer=nested))
    again = warp_reach if closest is warped else reach
    under_bounds = clock.timed("reach under the bounds", lambda: again(result.network, images, labels, seed=seed))
    found = _findings(logits, fitted, labels, closest.suspect)
    suspicious = flagged_images = None
    if suspect_images is not None:
        found_by = MarginDropDetector.from_logits(model, result.network, logits, fitted["mmac"], **settings)
        suspicious, flagged_images = _look_at(found_by, suspect_images, count)
    verdict = judge(found, margins, reached, warped, under_bounds, names, suspicious)
    tensors = _pictured(images, labels, logits, closest.suspect)
    tensors |= {} if margins.images is None else {"images": margins.images}
    tensors |= {} if flagged_images is None else {"flagged_images": flagged_images}
    bounded: Any = result.network
    extremes = activation_extremes(bounded, images)
    sites = {name: (extremes[name][1].amax(0), bound.upper.detach().cpu()) for name, bound in bounded.each()}
    return Audit(verdict, found, names, margins, reached, warped, under_bounds, clock.seconds, tensors, sites, suspicious)


def _check_parts(labels: Tensor, folds: int, names: tuple[str, ...]) -> None:
    """Raise :class:`UserError` for clean images of which a part cannot be left out."""
    check_folds(labels, folds)
    sizes = labels.bincount(minlength=len(names))
    few = int(sizes.argmin())
    require(
        int(sizes[few]) >= 2,
        f"an audit leaves a part of the clean images out and needs at least 2 of every class: class '{names[few]}' has {int(sizes[few])}",
    )


def _findings(logits: Tensor, fitted: Mapping[str, Tensor], labels: Tensor, suspect: int) -> Findings:
    """What the decisions show: those by ``logits`` (N, K) of the model, and by those of repairs that had not seen the image."""
    decisions, others = logits.argmax(1), {name: found.argmax(1) for name, found in fitted.items()}
    correct, changed, count = decisions == labels, decisions != others["mmac"], logits.shape[1]
    sizes = labels.bincount(minlength=count)
    return Findings(
        images=len(labels), classes=count, accuracy=float(correct.float().mean()),
        mmom=compare(correct, others["mmom"] == labels), mmac=compare(correct, others["mmac"] == labels),
        suspect=compare(labels == suspect, decisions == suspect),
        changed=int(changed.sum()), changed_from=decisions[changed].bincount(minlength=count).tolist(),
        changed_to=others["mmac"][changed].bincount(minlength=count).tolist(),
        smallest_class=int(sizes.min()), largest_class=int(sizes.max()),
    )  # fmt: skip


def _pictured(images: Tensor, labels: Tensor, logits: Tensor, suspect: int) -> dict[str, Tensor]:
    """The model's reliability, and clean images of the suspect class."""
    reliability = Reliability()
    reliability.update(logits.softmax(1), labels)
    return {"reliability": reliability.compute(), "examples": images[(labels == suspect).to(images.device)][:8].cpu()}


def _test(found: MaximumMargins) -> dict[str, Any]:
    return {
        "statistics": found.statistics.tolist(), "p_value": found.p_value, "published_p_value": found.uncalibrated_p_value,
        "suspect": found.suspect, "detected": found.detected,
    }  # fmt: skip


def _look_at(detector: MarginDropDetector, images: Tensor, count: int) -> tuple[Suspicious, Tensor]:
    detection = detector(images)
    flagged = detection.flagged.cpu()
    decisions = batched_logits(detector.model, images).argmax(1).cpu()[flagged].bincount(minlength=count)
    most = (
        detection.statistic.cpu().masked_fill(~flagged, float("-inf")).argsort(descending=True)[: min(24, int(flagged.sum()))]
    )
    return Suspicious(len(images), int(flagged.sum()), decisions.tolist(), detector.theta), images[most.to(images.device)].cpu()
