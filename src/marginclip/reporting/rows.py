"""A run record in words and numbers: what was run, and for each row of its metrics the label, values and seconds."""

from __future__ import annotations

import math
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
}
# Column heading -> key in the record; all are shares in [0, 1].
METRICS = {"ACC": "acc", "ASR": "asr", "PACC": "pacc", "TPR": "tpr", "FPR": "fpr", "AUC": "auroc"}
REPAIRED, DETECTED = ("repair",), ("repair", "detector")
PHASES = {"none": (), "mmac": REPAIRED, "mmdf": DETECTED}


def label(row: str) -> str:
    """The name to show for a key of ``record["metrics"]``; an unknown key is shown as it is."""
    return LABELS.get(row, row)


def metric(record: Record, row: str, heading: str) -> float | None:
    """A metric as a share in [0, 1]; None where the record has none (or a value that is not finite)."""
    value = record["metrics"][row].get(METRICS[heading])
    return float(value) if value is not None and math.isfinite(value) else None


def seconds(record: Record, row: str) -> float | None:
    """Seconds spent to obtain a row: the sum of its phases; None where one of them was not timed, and for the model as given.

    ``mmac`` and the row that the config names as ``defense.repaired_row`` took the phase ``repair``; ``mmdf`` and its
    ``defense.detector_row`` took ``repair`` and ``detector``; any other row took the phase of its own name.
    """
    timed = record.get("seconds") or {}
    defense = (record.get("config") or {}).get("defense") or {}
    named = {defense.get("repaired_row"): REPAIRED, defense.get("detector_row"): DETECTED}
    phases = (PHASES | named).get(row, (row,))
    found = [timed[phase] for phase in phases if timed.get(phase) is not None]
    return float(sum(found)) if phases and len(found) == len(phases) else None


def describe(record: Record) -> str:
    """What was run in a few words for a title, e.g. ``digits, small_resnet, badnet all2one``."""
    config = record.get("config") or {}
    names = {group: (config.get(group) or {}).get("name") for group in ("dataset", "model", "attack", "x2x")}
    if names["attack"] == "none":
        names |= {"attack": "no attack", "x2x": None}
    attack = " ".join(str(names[group]) for group in ("attack", "x2x") if names[group])
    return ", ".join(str(part) for part in (names["dataset"], names["model"], attack) if part)
