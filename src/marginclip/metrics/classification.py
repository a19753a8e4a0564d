"""Accuracy of every class, of common and rare ones, and calibration: what a balanced mean hides after imbalanced training.

Shares are in [0, 1]. A class without test images has no accuracy (NaN), and no part in what is averaged over classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

NUM_BINS = 15
MANY, FEW = 100, 20  # training images: more than MANY, fewer than FEW (Liu et al. 2019)
LARGEST_UPDATE = 2**24  # samples x cells counted at once where torchmetrics compares each sample with each cell


def shot_groups(training_counts: Tensor) -> dict[str, Tensor]:
    """Which classes are ``many`` (over 100 training images), ``medium`` (20 to 100) and ``few`` (under 20).

    Args:
        training_counts: the training images of every class, (K,) whole numbers.

    Returns:
        By name, masks (K,), bool, of which one holds for every class.
    """
    many, few = training_counts > MANY, training_counts < FEW
    return {"many": many, "medium": ~many & ~few, "few": few}


def shot_accuracy(per_class: Tensor, training_counts: Tensor) -> dict[str, float]:
    """Mean of the classes' accuracies over each of :func:`shot_groups`.

    Args:
        per_class: the accuracy of every class, (K,) in [0, 1]; NaN for a class without test images.
        training_counts: the training images of every class, (K,) whole numbers.

    Returns:
        The mean by group, in [0, 1]; a group without tested classes is left out.
    """
    chosen = {name: per_class[mask.to(per_class.device)] for name, mask in shot_groups(training_counts).items()}
    return {name: float(values.nanmean()) for name, values in chosen.items() if not values.isnan().all()}


def top_label(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence (N,) of the likeliest class of ``probabilities`` (N, K), and whether (N,) it is the label."""
    confidence, decided = probabilities.max(1)
    return confidence, decided == labels


def brier_scores(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of probabilities from the label's unit vector, summed over classes.

    Args:
        probabilities: of the classes, (N, K) in [0, 1].
        labels: (N,) int64 in [0, K).

    Returns:
        The scores (N,), in [0, 2].
    """
    truth = F.one_hot(labels, probabilities.shape[1])
    return (probabilities - truth).square().sum(1)


class DecisionScores(nn.Module):
    """Per-class scores of decisions (N,) int64 against labels (N,).

    A decision of -1 means that the sample was rejected: it is wrong for its class, and a column of its own behind the classes.

    Args:
        num_classes: K, without the rejected.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        settings: dict[str, Any] = {"num_classes": num_classes + 1, "validate_args": False}  # the last one: rejected
        self.counts = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(average=None, **settings),
                "f1": MulticlassF1Score(average=None, **settings),
                "confusion": MulticlassConfusionMatrix(**settings),
            }
        )

    def update(self, decisions: Tensor, labels: Tensor) -> None:
        """Count a batch."""
        compares = torch.are_deterministic_algorithms_enabled() or decisions.is_mps
        size = max(1, LARGEST_UPDATE // (self.num_classes + 1) ** 2 if compares else len(decisions))
        decisions = torch.where(decisions < 0, self.num_classes, decisions)
        for decided, truth in zip(decisions.split(size), labels.split(size), strict=True):
            self.counts.update(decided, truth)

    def confusion(self) -> Tensor:
        """Counts (K, K + 1) int64: rows are the true class, columns the decision, the last one rejected samples."""
        return self.counts["confusion"].compute()[: self.num_classes]  # type: ignore[no-any-return]

    def per_class(self) -> Tensor:
        """Accuracy (K,) of every class; NaN without test images."""
        accuracy = self.counts["accuracy"].compute()[: self.num_classes]
        return torch.where(self.confusion().sum(1) > 0, accuracy, torch.nan)

    def macro_f1(self) -> float:
        """Mean F1 over the classes that are the label or the decision of some sample."""
        confusion = self.confusion()
        present = (confusion.sum(1) > 0) | (confusion.sum(0)[: self.num_classes] > 0)
        return float(self.counts["f1"].compute()[: self.num_classes][present].mean())

    def scores(self, training_counts: Tensor | None = None) -> dict[str, float]:
        """``macro_f1``, ``worst_class`` and, by the classes' ``training_counts`` (K,), the groups of :func:`shot_accuracy`."""
        per_class = self.per_class()
        tested = per_class[~per_class.isnan()]
        found = {"macro_f1": self.macro_f1(), "worst_class": float(tested.min())}
        return found if training_counts is None else found | shot_accuracy(per_class, training_counts)


class Reliability(Metric):
    """Calibration by ``NUM_BINS`` equal bins of the likeliest class's confidence: what a reliability diagram shows.

    A bin holds its lower edge but not its upper one; the last bin holds confidence 1 too.

    Args:
        **settings: those of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    count: Tensor
    confidence: Tensor
    hits: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name in ("count", "confidence", "hits"):
            self.add_state(name, torch.zeros(NUM_BINS), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Sort a batch of ``probabilities`` (N, K) with its ``labels`` (N,) into the bins."""
        confidence, right = top_label(probabilities, labels)
        edges = torch.linspace(0, 1, NUM_BINS + 1, device=confidence.device)
        bins = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=NUM_BINS - 1)
        member = F.one_hot(bins, NUM_BINS).float()
        self.count += member.sum(0)
        self.confidence += (member * confidence.unsqueeze(1)).sum(0)
        self.hits += (member * right.unsqueeze(1)).sum(0)

    def compute(self) -> Tensor:
        """Number of samples, mean confidence and accuracy of every bin, (15, 3); the latter two are NaN in an empty bin."""
        return torch.stack([self.count, self.confidence / self.count, self.hits / self.count], 1)


class CalibrationScores(nn.Module):
    """Calibration of logits (N, K) against labels (N,): ``ece``, ``mce``, ``nll`` (nats), ``brier`` and reliability bins.

    ECE and MCE are the mean (by samples) and the largest gap between confidence and accuracy over the bins of
    :class:`Reliability` (Guo et al. 2017).

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        settings: dict[str, Any] = {"num_classes": num_classes, "n_bins": NUM_BINS, "validate_args": False}
        self.errors = MetricCollection(
            {
                "ece": MulticlassCalibrationError(norm="l1", **settings),
                "mce": MulticlassCalibrationError(norm="max", **settings),
            }
        )
        self.means = nn.ModuleDict({name: MeanMetric() for name in ("nll", "brier")})
        self.reliability = Reliability()

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Score a batch."""
        logits = logits.float()
        probabilities = logits.softmax(1)
        # torchmetrics gives confidence 1, to which float32 rounds a sure network's, a sixteenth bin: it belongs to the last.
        below_one = probabilities.clamp(max=1 - torch.finfo(torch.float32).eps / 2)
        self.errors.update(below_one, labels)
        self.means["nll"].update(F.cross_entropy(logits, labels, reduction="none"))  # type: ignore[operator]
        self.means["brier"].update(brier_scores(probabilities, labels))  # type: ignore[operator]
        self.reliability.update(probabilities, labels)

    def scores(self) -> dict[str, float]:
        """``ece`` and ``mce`` in [0, 1], ``nll`` in nats, ``brier`` in [0, 2]."""
        found = {name: float(value) for name, value in self.errors.compute().items()}
        return found | {name: float(mean.compute()) for name, mean in self.means.items()}  # type: ignore[operator]
