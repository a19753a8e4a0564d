"""Metrics of attacks and defenses, as torchmetrics."""

from marginclip.metrics.backdoor import (
    Agreement,
    AttackSuccessRate,
    CleanAccuracy,
    FlaggedRate,
    PoisonedAccuracy,
    Share,
    share_equal,
)
from marginclip.metrics.classification import (
    CalibrationScores,
    DecisionScores,
    Reliability,
    brier_scores,
    shot_accuracy,
    shot_groups,
)

__all__ = [
    "Agreement",
    "AttackSuccessRate",
    "CalibrationScores",
    "CleanAccuracy",
    "DecisionScores",
    "FlaggedRate",
    "PoisonedAccuracy",
    "Reliability",
    "Share",
    "brier_scores",
    "share_equal",
    "shot_accuracy",
    "shot_groups",
]
