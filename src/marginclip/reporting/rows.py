"""A run record in words and numbers: what was run, and for each row of its metrics the label, values and seconds."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

Record = dict[str, Any]
LABELS = {
    "none": "no defense",
    "mmac": "MMAC",
    "mmdf": "MMDF",
    "mmom": "MMOM",
    "mmbm": "MMBM",
    "static_clip": "static clip",
    "static_clip_mmdf": "static clip + MMDF",
    "finetune": "fine-tuning",
    "fine_pruning": "Fine-Pruning",
    "fine_pruning_pruned": "Fine-Pruning, pruned only",
    "nad": "NAD",
    "nad_teacher": "NAD, teacher",
    "neural_cleanse": "Neural Cleanse",
    "ibau": "I-BAU",
    "logit_adjustment": "logit adjustment",
    "tau_normalisation": "tau-normalisation",
    "bias_only": "bias only",
    "temperature_scaling": "temperature scaling",
    "bias_corrected_temperature": "bias-corrected temperature",
    "vector_scaling": "vector scaling",
    "lws": "LWS",
    "last_layer": "last layer",
    "auto": "automatic choice",
}
# Column heading -> key in the record; all are shares in [0, 1], but NLL, which is in nats.
METRICS = {"ACC": "acc", "ASR": "asr", "PACC": "pacc", "TPR": "tpr", "FPR": "fpr", "AUC": "auroc"}
PER_CLASS = {"ACC": "acc", "MANY": "many", "MEDIUM": "medium", "FEW": "few", "WORST": "worst_class", "ECE": "ece", "NLL": "nll"}
ALL_METRICS = PER_CLASS | METRICS
NATS = "NLL"
REPAIRED, DETECTED = ("repair",), ("repair", "detector")
PHASES = {"none": (), "mmac": REPAIRED, "mmdf": DETECTED}


def label(row: str) -> str:
    """The name to show for a key of ``record["metrics"]``; an unknown key is shown as it is."""
    return LABELS.get(row, row)


def columns(record: Record) -> dict[str, str]:
    """The metrics to show: ``METRICS`` of a backdoored model; of one without attack or with imbalanced classes, ``ALL_METRICS``."""
    return ALL_METRICS if imbalance(record) or group_name(record, "attack") == "none" else METRICS


def group_name(record: Record, group: str) -> str | None:
    """The name of what was chosen of a group of the configuration; None where the record has none."""
    name = ((record.get("config") or {}).get(group) or {}).get("name")
    return None if name is None else str(name)


def imbalance(record: Record) -> str:
    """Profile and ratio of an imbalanced training set, e.g. ``exponential 100``; an empty string for all images."""
    name = group_name(record, "imbalance")
    if name in (None, "none"):
        return ""
    ratio = record["config"]["imbalance"].get("ratio")
    return f"{name}" if ratio is None else f"{name} {ratio:g}"


def loss(record: Record) -> str:
    """The training loss; an empty string for cross entropy, which records without the group used."""
    name = group_name(record, "loss")
    return "" if name in (None, "cross_entropy") else str(name)


def before_and_after(record: Record, available: Container[str]) -> list[str]:
    """The rows of the model as given and of its repair, of those that are ``available``."""
    repaired = ((record.get("config") or {}).get("defense") or {}).get("repaired_row")
    return [row for row in ("none", repaired) if row is not None and row in available]


def metric(record: Record, row: str, heading: str) -> float | None:
    """A metric as it is in the record; None where that has none (or a value that is not finite)."""
    value = record["metrics"][row].get(ALL_METRICS[heading])
    return float(value) if value is not None and math.isfinite(value) else None


def seconds(record: Record, row: str) -> float | None:
    """Seconds spent to obtain a row: the sum of its phases; None where one of them was not timed, and for the model as given.

    ``mmac`` and the row that the config names as ``defense.repaired_row`` took the phase ``repair``; ``mmdf`` and its
    ``defense.detector_row`` (without one, the repaired row's name and ``_mmdf``) took ``repair`` and ``detector``; any other row
    took the phase of its own name.
    """
    timed = record.get("seconds") or {}
    defense = (record.get("config") or {}).get("defense") or {}
    repaired = defense.get("repaired_row")
    named = {repaired: REPAIRED, defense.get("detector_row") or f"{repaired}_mmdf": DETECTED}
    phases = (PHASES | named).get(row, (row,))
    found = [timed[phase] for phase in phases if timed.get(phase) is not None]
    return float(sum(found)) if phases and len(found) == len(phases) else None


def describe(record: Record) -> str:
    """What was run in a few words for a title, e.g. ``digits, small_resnet, badnet all2one``."""
    names = {group: group_name(record, group) for group in ("dataset", "model", "attack", "x2x")}
    if names["attack"] == "none":
        names |= {"attack": "no attack", "x2x": None}
    attack = " ".join(str(names[group]) for group in ("attack", "x2x") if names[group])
    parts = (names["dataset"], names["model"], imbalance(record), loss(record), attack)
    return ", ".join(str(part) for part in parts if part)
