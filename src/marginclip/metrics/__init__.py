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

__all__ = ["Agreement", "AttackSuccessRate", "CleanAccuracy", "FlaggedRate", "PoisonedAccuracy", "Share", "share_equal"]
