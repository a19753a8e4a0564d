"""The papers' own figures, to stand beside ours: ``published.json``, typed in from their tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from marginclip.record import RunRecord

FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """A method's figures in a table of a paper: ``metrics`` are mean and, where it is given, deviation, in percent."""

    source: str
    metrics: dict[str, list[float]]


@cache
def tables() -> list[dict[str, Any]]:
    """All that is in the file: a ``source``, ``when`` it can stand beside a run, and the metrics of ``rows``."""
    content: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def published_for(record: RunRecord, row: str) -> Published | None:
    """The paper's figures for a row of a run of the same data set, attack, X2X setting and, where the table names one, model.

    Copies of a data set in a folder count as it: ``cifar10_images`` is ``cifar10``. Width of the model, training and clean-set size are
    not compared.
    """
    found = next((table for table in tables() if row in table["rows"] and _fits(record, table["when"])), None)
    return None if found is None else Published(found["source"], found["rows"][row])


def _fits(record: RunRecord, when: dict[str, Any]) -> bool:
    dataset = (record.choice("dataset") or "").partition("_")[0]
    chosen = {group: record.choice(group) or "none" for group in ("attack", "x2x", "model", "imbalance", "loss")}
    chosen["loss"] = "cross_entropy" if chosen["loss"] == "none" else chosen["loss"]
    wanted = {"dataset": "", "imbalance": "none", "attack": "none", "loss": "cross_entropy"} | when
    ratio = wanted.pop("ratio", None)
    return all((chosen | {"dataset": dataset})[key] == value for key, value in wanted.items()) and (
        ratio is None or record.setting("imbalance.ratio") == ratio
    )
