"""The papers' own figures, to stand beside ours: the first paper's of :mod:`marginclip.reporting.published`, the second's of
``published.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from marginclip.record import RunRecord
from marginclip.reporting.published import figures

SECOND_PAPER = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """A method's figures in a table of a paper: ``metrics`` are mean and, where it is given, deviation, in percent."""

    source: str
    metrics: dict[str, list[float]]


@cache
def tables() -> list[dict[str, Any]]:
    """The tables of both papers: a ``source``, ``when`` it can stand beside a run, and the metrics of ``rows``."""
    second: list[dict[str, Any]] = json.loads(SECOND_PAPER.read_text(encoding="utf-8"))
    return [*_first_paper(), *second]


def _first_paper() -> list[dict[str, Any]]:
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in figures():
        place = tuple(line[key] for key in ("table", "dataset", "attack", "x2x", "beta"))
        when: dict[str, Any] = {key: line[key] for key in ("dataset", "attack", "x2x") if line[key] != "-"}
        when |= {"model": "resnet18"} if line["dataset"] == "cifar10" else {}
        when |= {"beta": float(line["beta"])} if line["beta"] else {}
        source = f"arXiv 2308.04617, Table {line['table'].removeprefix('table')}"
        table = found.setdefault(place, {"source": source, "when": when, "rows": {}})
        values = [float(line[key]) for key in ("mean", "deviation") if line[key]]
        table["rows"].setdefault(line["row"], {})[line["metric"].upper()] = values
    return list(found.values())


def published_for(record: RunRecord, row: str) -> Published | None:
    """The paper's figures for a row of a run of the same data set, attack, X2X setting and, where the table names one, model.

    Copies of a data set in a folder count as it: ``cifar10_images`` is ``cifar10``. Width of the model, training and clean-set size are
    not compared.
    """
    found = next((table for table in tables() if row in table["rows"] and _fits(record, table["when"])), None)
    return None if found is None else Published(found["source"], found["rows"][row])


def _fits(record: RunRecord, when: dict[str, Any]) -> bool:
    chosen = {group: record.choice(group) or "none" for group in ("attack", "x2x", "model", "imbalance", "loss")}
    chosen["loss"] = "cross_entropy" if chosen["loss"] == "none" else chosen["loss"]
    wanted = {"imbalance": "none", "attack": "none", "loss": "cross_entropy"} | when
    dataset, ratio, beta = (wanted.pop(key, None) for key in ("dataset", "ratio", "beta"))
    return (
        f"{record.choice('dataset') or ''}_".startswith(f"{dataset}_")
        and all(chosen[key] == value for key, value in wanted.items())
        and (ratio is None or record.setting("imbalance.ratio") == ratio)
        and (beta is None or record.setting("attack.beta") == beta)
    )
