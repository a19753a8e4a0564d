"""MMDF: detecting triggered images by how far bounding lowers their margin, and correcting the decision (paper 1, section 4)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marginclip.errors import nearest, require
from marginclip.maxmargin.margin import margin
from marginclip.maxmargin.null import NULLS, p_values, threshold
from marginclip.maxmargin.statistic import STATISTICS, Line, detection_lines, largest_of, margins
from marginclip.networks.logits import batched_logits, check_images, clean_logits

log = logging.getLogger(__name__)
DECISION_RULES = ("paper", "repaired", "or_disagree")
CORRECTIONS = ("exclude", "insist", "reject")


@dataclass(frozen=True)
class Detection:
    """What a detector says of N images; all tensors are (N,).

    Args:
        decisions: the corrected classes, int64; -1 is a rejected image.
        flagged: whether the image is taken for a triggered one.
        p_values: the chance that the statistic of a clean image is as large, in [0, 1].
        statistic: what the p-value is of: the margin drop S in logits, or another (:class:`MarginDropDetector`).
    """

    decisions: Tensor
    flagged: Tensor
    p_values: Tensor
    statistic: Tensor


class MarginDropDetector(nn.Module):
    """Flags images whose margin drops too far under the bounds for a clean image, and corrects their decision.

    Called with images (N, C, H, W) in [0, 1] it returns a :class:`Detection`. :meth:`fit` makes one from clean images.

    Args:
        model: the classifier as it was given: images to logits.
        repaired: the same with bounds.
        clean_drops: margin drops of clean images, (M,) in logits.
        clean_margins: the margin that the repaired network leaves to the model's decision there, (M,) in logits.
        theta: an image is flagged where its p-value is below this share, in (0, 1).
        null_distribution: how margin drops become p-values: ``tail``, ``empirical`` or ``gaussian``
            (:func:`marginclip.maxmargin.null.p_values`).
        statistic: what the p-value is of (:func:`~marginclip.maxmargin.detection_lines`). ``drop``, which is MMDF: the margin drop S.
            Ours are ``shortfall``, by how much the margin falls short of what bounds leave to clean images of the same margin, and
            ``both``, the larger of the two, in standard deviations of the clean images.
        rule: who decides what is not flagged. ``paper``, which is MMDF: the model. ``repaired``, which is ours: the repaired network;
            it costs what the repair costs in accuracy, and catches triggers of small margin, as of all2all attacks, that the
            bounds undo without a large drop. ``or_disagree``, the wording of the second paper: the model, and images on which
            the two networks disagree are flagged too.
        correction: what is decided about a flagged image. ``exclude`` (the papers): the repaired network's best class *other than*
            the model's; a false alarm is then always wrong, which is why the null must be well calibrated. ``insist`` keeps the
            model's class where the repaired network chooses it too, by a margin of at least the clean samples' median. It
            forgives false alarms, and also triggers that survive the repair. So use it only where repaired and attacked network
            agree on little. ``reject``: -1.

    Raises:
        UserError: for a setting that is not one of these.
    """

    clean_drops: Tensor
    clean_margins: Tensor

    def __init__(
        self,
        model: nn.Module,
        repaired: nn.Module,
        clean_drops: Tensor,
        clean_margins: Tensor,
        *,
        theta: float = 0.005,
        null_distribution: str = "tail",
        statistic: str = "drop",
        rule: str = "paper",
        correction: str = "exclude",
    ) -> None:
        super().__init__()
        self.model, self.repaired = model, repaired
        self.theta, self.null_distribution, self.statistic = theta, null_distribution, statistic
        self.rule, self.correction = rule, correction
        self._check()
        self.register_buffer("clean_drops", clean_drops.detach().float().cpu())
        self.register_buffer("clean_margins", clean_margins.detach().float().cpu())

    @classmethod
    @torch.no_grad()
    def fit(
        cls, model: nn.Module, repaired: nn.Module, images: Tensor, *, batch_size: int | None = None, **settings: Any
    ) -> MarginDropDetector:
        """Make a detector whose null is that of clean images.

        Args:
            model: the classifier as it was given: images to logits.
            repaired: the same with bounds.
            images: clean images (M, C, H, W) in [0, 1]. Those that the bounds were *not* learned from give a better calibrated null;
                those that they were learned from, as in the papers, make false alarms more frequent than ``theta``.
            batch_size: images in a forward pass.
            **settings: ``theta``, ``null_distribution``, ``statistic``, ``rule`` and ``correction`` of the constructor.

        Returns:
            The detector; it logs a warning where the images are too few for it to flag anything.

        Raises:
            UserError: for fewer than 2 images, images outside [0, 1], and wrong settings.
        """
        check_images(images)
        require(len(images) >= 2, f"a detector needs at least 2 clean images, got {len(images)}")
        both = (clean_logits(network, images, batch_size=batch_size) for network in (model, repaired))
        return cls.from_logits(model, repaired, *both, **settings)

    @classmethod
    def from_logits(
        cls, model: nn.Module, repaired: nn.Module, logits: Tensor, bounded_logits: Tensor, **settings: Any
    ) -> MarginDropDetector:
        """The same from the two networks' logits (M, K) on clean images, e.g. cross-fitted ones."""
        require(
            bool(torch.isfinite(logits).all() and torch.isfinite(bounded_logits).all()),
            "the logits of the clean images that a detector is made from must be finite, got NaN or infinite ones",
        )
        without, kept = margins(logits, bounded_logits)
        drops = without - kept
        detector = cls(model, repaired, drops, kept, **settings)
        if detector.threshold == float("inf"):
            alike = float(drops.min()) == float(drops.max())
            why = "lose the same margin" if alike else f"are too few for theta={detector.theta:g}"
            log.warning("this detector flags nothing: its %d clean images %s", len(drops), why)
        return detector

    def changed(self, *, rule: str | None = None, statistic: str | None = None) -> MarginDropDetector:
        """The same detector with another ``rule`` or ``statistic``; both share networks and clean images."""
        other = copy.copy(self)
        other.rule, other.statistic = rule or self.rule, statistic or self.statistic
        other._check()
        return other

    @property
    def lines(self) -> list[Line]:
        """The lines whose largest value is the statistic."""
        return detection_lines(self.statistic, self.clean_drops + self.clean_margins, self.clean_margins)

    @property
    def clean_statistics(self) -> Tensor:
        """The null: the statistic of the clean images, (M,)."""
        if self.statistic == "drop":
            return self.clean_drops
        return largest_of(self.clean_drops + self.clean_margins, self.clean_margins, self.lines)

    @property
    def insisting_margin(self) -> float:
        """The margin from which on the repaired network insists on a class: the clean samples' median."""
        return float(self.clean_margins.median())

    @property
    def threshold(self) -> float:
        """The statistic from which on an image is flagged."""
        return threshold(self.clean_statistics, self.theta, null_distribution=self.null_distribution)

    def forward(self, images: Tensor) -> Detection:
        """Decisions and p-values of images (N, C, H, W) in [0, 1], however many, on the model's device; both networks are evaluated in
        evaluation mode, whatever mode they are in. Raises :class:`UserError` for other images."""
        check_images(images)
        logits, bounded_logits = (batched_logits(network, images) for network in (self.model, self.repaired))
        return self.decide(logits, bounded_logits.to(logits.device))

    def decide(self, logits: Tensor, bounded_logits: Tensor) -> Detection:
        """The same from both networks' logits (N, K), which are left as they are; images whose logits are not finite are flagged."""
        statistic = self.statistic_of(logits, bounded_logits)
        values = p_values(statistic, self.clean_statistics.to(statistic.device), null_distribution=self.null_distribution)
        values = torch.where((logits + bounded_logits).isfinite().all(1), values, torch.zeros_like(values))
        kept, instead, always = self.alternatives(logits, bounded_logits)
        flagged = (values < self.theta) | always
        return Detection(torch.where(flagged, instead, kept), flagged, values, statistic)

    def statistic_of(self, logits: Tensor, bounded_logits: Tensor) -> Tensor:
        """The statistic (N,) of images from both networks' logits (N, K)."""
        return largest_of(*margins(logits, bounded_logits), self.lines)

    def alternatives(self, logits: Tensor, bounded_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is decided of images (N,) whose p-value is not below ``theta``, and of those whose p-value is; and which are flagged
        whatever their p-value (``or_disagree``)."""
        original, chosen = logits.argmax(1), bounded_logits.argmax(1)
        instead = corrected(original, bounded_logits, self.correction, self.insisting_margin)
        always = (chosen != original) if self.rule == "or_disagree" else torch.zeros_like(original, dtype=torch.bool)
        standing = chosen if self.rule == "repaired" else original
        return torch.where(always, instead, standing), instead, always

    def _check(self) -> None:
        """Raise :class:`UserError` unless the settings are valid."""
        theta = self.theta
        require(
            isinstance(theta, (int, float)) and not isinstance(theta, bool) and 0 < theta < 1,
            f"detector.theta must be in (0, 1), got {theta}",
        )
        allowed = {"null_distribution": NULLS, "statistic": STATISTICS, "rule": DECISION_RULES, "correction": CORRECTIONS}
        for key, values in allowed.items():
            value = getattr(self, key)
            require(value in values, f"detector.{key} must be one of {', '.join(values)}, got '{value}'")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for what :class:`MarginDropDetector` does not take, before what it is made from is computed."""
    known = ("theta", "null_distribution", "statistic", "rule", "correction")
    for key in settings:
        require(key in known, f"unknown setting detector.{key}{nearest(key, known)} (there are {', '.join(known)})")
    MarginDropDetector(nn.Identity(), nn.Identity(), torch.zeros(2), torch.zeros(2), **settings)


def corrected(original: Tensor, bounded_logits: Tensor, correction: str, insisting_margin: float) -> Tensor:
    """The decisions (N,) that flagged images get in place of ``original`` (N,), by the repaired network's logits (N, K); -1: rejected.

    See :class:`MarginDropDetector` for the ways of ``correction``; ``insisting_margin``, in logits, is that of ``insist``.
    """
    if correction == "reject":
        return torch.full_like(original, -1)
    others = bounded_logits.scatter(1, original.unsqueeze(1), float("-inf")).argmax(1)
    if correction == "exclude":
        return others
    return torch.where(margin(bounded_logits, original) >= max(insisting_margin, 0.0), original, others)
