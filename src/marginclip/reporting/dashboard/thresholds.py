"""What a detector would do at another threshold: counts at some hundred of them, exact at each."""

from __future__ import annotations

from typing import Any

import numpy as np

from marginclip.record import RunRecord
from marginclip.reporting.detection import threshold_of
from marginclip.reporting.rows import label
from marginclip.reporting.style import Arrays

NUM_BINS = 48
ROC_POINTS = 40
# Shares of images above a threshold at which one is put: close together where false alarms are rare.
TAIL = np.concatenate([np.geomspace(0.0005, 0.1, 18), np.linspace(0.2, 0.9, 8)])
OUTCOMES = {"correct": "clean_correct", "success": "triggered_success", "restored": "triggered_restored"}
FLAGGED = {"clean": "clean_correct", "triggered": "triggered_success"}


def detections(record: RunRecord, arrays: Arrays) -> list[dict[str, Any]]:
    """An entry for each row with ``scores/<row>_clean`` (N,): histograms, and counts at each of its ``thresholds``, in logits.

    ``false`` and ``true`` count the clean and triggered images that are flagged, ``correct``, ``success`` and ``restored`` those that
    :data:`OUTCOMES` hold for; None where the run did not save ``outcomes/<row>/``. ``at`` is the position of the run's own threshold
    among the thresholds, None where that is infinite.
    """
    return [
        _detection(record, arrays, row)
        for row in record.rows
        if len(arrays.get(f"scores/{row}_clean", ())) and len(arrays.get(f"scores/{row}_triggered", (0.0,)))
    ]


def _detection(record: RunRecord, arrays: Arrays, row: str) -> dict[str, Any]:
    scores = {kind: arrays[name] for kind in FLAGGED if (name := f"scores/{row}_{kind}") in arrays}
    own = threshold_of(record)
    thresholds = candidates(scores, own)
    edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), NUM_BINS)
    saved = {key: codes for key in OUTCOMES.values() if (codes := _codes(arrays, row, key)) is not None}
    found: dict[str, Any] = {
        "row": row,
        "label": label(record, row),
        "thresholds": thresholds.tolist(),
        "at": None if own is None else int(np.searchsorted(thresholds, own)),
        "edges": [float(f"{edge:.5g}") for edge in edges],
        "histogram": {kind: np.histogram(values, edges)[0].tolist() for kind, values in scores.items()},
        "images": {kind: len(values) for kind, values in scores.items()},
    }
    for name, kind in (("false", "clean"), ("true", "triggered")):
        always = saved[FLAGGED[kind]] >= 4 if FLAGGED[kind] in saved else None
        found[name] = flagged_at(scores[kind], thresholds, always).tolist() if kind in scores else None
    for name, key in OUTCOMES.items():
        kind = key.partition("_")[0]
        found[name] = holds_at(scores[kind], saved[key], thresholds).tolist() if key in saved and kind in scores else None
    return found


def _codes(arrays: Arrays, row: str, key: str) -> np.ndarray | None:
    values = arrays.get(f"outcomes/{row}/{key}")
    return None if values is None else values.astype(np.int64)


def candidates(scores: dict[str, np.ndarray], own: float | None) -> np.ndarray:
    """Thresholds (T,), ascending: evenly spaced ones, quantiles of both kinds, ones beyond all scores, and the run's ``own`` exactly."""
    everything = np.concatenate(list(scores.values())).astype(np.float64)
    low, high = everything.min(), everything.max()
    span = max(high - low, 1e-6)
    parts = [np.linspace(low, high, 30), np.array([low - 0.01 * span, high + 0.01 * span])]
    parts += [np.quantile(values, 1 - TAIL) for values in scores.values()]
    rounded = np.array([float(f"{value:.5g}") for value in np.concatenate(parts)])
    return np.unique(rounded if own is None else np.append(rounded, own))


def flagged_at(scores: np.ndarray, thresholds: np.ndarray, always: np.ndarray | None = None) -> np.ndarray:
    """How many of ``scores`` (N,) reach each threshold (T,), or are flagged ``always`` (N,)."""
    fixed = 0 if always is None else int(always.sum())
    varying = np.sort(scores if always is None else scores[~always]).astype(np.float64)
    return fixed + len(varying) - np.searchsorted(varying, thresholds)


def holds_at(scores: np.ndarray, codes: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """For how many images an outcome holds at each threshold (T,): ``codes`` (N,) say it below (1) and from the threshold on (2)."""
    order = np.argsort(scores, kind="stable")
    below, above = codes[order] & 1, (codes[order] >> 1) & 1
    gained = np.concatenate([np.cumsum((above - below)[::-1])[::-1], [0]])
    first = np.searchsorted(scores[order].astype(np.float64), thresholds)
    return np.asarray(below.sum() + gained[first])


def roc(detection: dict[str, Any]) -> list[list[float]] | None:
    """At most ``ROC_POINTS`` points (threshold, FPR, TPR) of a detection, its own among them; None without triggered images."""
    if detection["true"] is None:
        return None
    clean, triggered = detection["images"]["clean"], detection["images"]["triggered"]
    points = zip(detection["thresholds"], detection["false"], detection["true"], strict=True)
    every = [[threshold, round(false / clean, 5), round(true / triggered, 5)] for threshold, false, true in points]
    distinct = [point for last, point in zip([None, *every], every, strict=False) if last is None or point[1:] != last[1:]]
    if detection["at"] is not None and every[detection["at"]] not in distinct:
        distinct = sorted([*distinct, every[detection["at"]]])
    chosen = set(np.linspace(0, len(distinct) - 1, min(ROC_POINTS, len(distinct))).round().astype(int).tolist())
    own = None if detection["at"] is None else every[detection["at"]]
    return [point for number, point in enumerate(distinct) if number in chosen or point == own]
