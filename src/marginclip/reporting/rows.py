"""A run record in words and numbers: what was run, and for each row of its metrics the label, values and seconds."""

from __future__ import annotations

import math
from collections.abc import Container

from marginclip.record import RunRecord

# Column heading -> key in the record; all are shares in [0, 1], but NLL, which is in nats.
METRICS = {"ACC": "acc", "ASR": "asr", "PACC": "pacc", "TPR": "tpr", "FPR": "fpr", "AUC": "auroc"}
PER_CLASS = {"ACC": "acc", "MANY": "many", "MEDIUM": "medium", "FEW": "few", "WORST": "worst_class", "ECE": "ece", "NLL": "nll"}
ALL_METRICS = PER_CLASS | METRICS
NATS = "NLL"


def label(record: RunRecord, row: str) -> str:
    """What tables call a row."""
    return record.rows[row].label


def columns(record: RunRecord) -> dict[str, str]:
    """The metrics to show: ``METRICS`` of a backdoored model; of one without attack or with imbalanced classes, ``ALL_METRICS``."""
    return ALL_METRICS if imbalance(record) or record.choice("attack") == "none" else METRICS


def imbalance(record: RunRecord) -> str:
    """Profile and ratio of an imbalanced training set, e.g. ``exponential 100``; an empty string for all images."""
    name, ratio = record.choice("imbalance"), record.setting("imbalance.ratio")
    if name in (None, "none"):
        return ""
    return f"{name}" if ratio is None else f"{name} {ratio:g}"


def loss(record: RunRecord) -> str:
    """The training loss; an empty string for cross entropy."""
    name = record.choice("loss")
    return "" if name in (None, "cross_entropy") else str(name)


def before_and_after(record: RunRecord, available: Container[str]) -> list[str]:
    """The rows of the model as given and of its repair, of those that are ``available``."""
    return [row for row in record.rows if row in ("none", record.repaired_row) and row in available]


def metric(record: RunRecord, row: str, heading: str) -> float | None:
    """A metric as it is in the record; None where that has none (or a value that is not finite)."""
    value = record.metrics[row].get(ALL_METRICS[heading])
    return value if value is not None and math.isfinite(value) else None


def success_before(record: RunRecord) -> float | None:
    """The ASR of the model as given, in [0, 1]; None where it was not measured."""
    return record.metrics.get("none", {}).get("asr")


def seconds(record: RunRecord, row: str) -> float | None:
    """Seconds spent to obtain a row: the sum of its phases; None where one of them was not timed, and for the model as given."""
    phases = record.rows[row].phases
    found = [record.seconds[phase] for phase in phases if phase in record.seconds]
    return sum(found) if phases and len(found) == len(phases) else None


def describe(record: RunRecord) -> str:
    """What was run in a few words for a title, e.g. ``digits, small_resnet, badnet all2one``."""
    attack, x2x = record.choice("attack"), record.choice("x2x")
    attacked = "no attack" if attack == "none" else " ".join(name for name in (attack, x2x) if name)
    parts = (record.choice("dataset"), record.choice("model"), imbalance(record), loss(record), attacked)
    return ", ".join(part for part in parts if part)
