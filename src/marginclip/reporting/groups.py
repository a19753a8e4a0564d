"""Which runs are of one setting: what a row of the summary averages over, and what a comparison compares."""

from __future__ import annotations

from collections.abc import Iterable

from marginclip.record import RunRecord
from marginclip.reporting.rows import imbalance, loss

Group = tuple[str, ...]
LEFT_OUT = {"attack_failed": "attack failed", "failed": "run failed", "running": "not finished"}
# Settings that a sweep varies within a row's other names -> their dotted key.
SWEPT = {"epochs": "training.epochs", "λ": "defense.lambda_.initial"}


def section(record: RunRecord) -> Group:
    """Data set, model (with width and, where it is not ReLU, activation), imbalance, its ratio, loss, clean-set size and what was
    evaluated on; imbalance, ratio and loss are empty strings for all images and cross entropy.
    """
    width, activation = record.setting("model.width"), record.setting("model.activation")
    details = [] if width is None else [f"width {width}"]
    if activation not in (None, "relu"):
        details.append(str(activation))
    described = named(record, "model") + (f" ({', '.join(details)})" if details else "")
    evaluated = ", evaluated on the clean set itself" if record.evaluated_on == "clean_set" else ""
    profile, _, ratio = imbalance(record).partition(" ")
    clean = "-" if record.clean_set_size is None else str(record.clean_set_size)
    return named(record, "dataset"), described, profile, ratio, loss(record), clean, evaluated


def section_title(group: Group) -> str:
    """A section in words, e.g. ``cifar10, resnet32, exponential 100, mixup, clean set of 500``."""
    dataset, model, profile, ratio, trained_with, clean, evaluated = group
    parts = (dataset, model, f"{profile} {ratio}".strip(), trained_with, f"clean set of {clean}{evaluated}")
    return ", ".join(part for part in parts if part)


def row_group(record: RunRecord) -> Group:
    """Attack, X2X setting (none without an attack) and defense."""
    attack = named(record, "attack")
    return attack, "-" if attack == "none" else named(record, "x2x"), named(record, "defense")


def named(record: RunRecord, group: str) -> str:
    """The name of what was chosen of a group of the configuration, or "-"."""
    return record.choice(group) or "-"


def swept(record: RunRecord, name: str) -> float | None:
    """The value of a setting of ``SWEPT``; None where the run has none."""
    value = record.setting(SWEPT[name])
    return None if value is None else float(value)


def swept_text(name: str, value: float) -> str:
    """A value of a setting of ``SWEPT`` in words: ``200 epochs``, ``λ = 1e-05``."""
    return f"{value:g} {name}" if name == "epochs" else f"{name} = {value:g}"


def split_swept(records: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    """The records by what a sweep varied among them, in words, in its order; all under "" where nothing was."""
    records = list(records)
    varied = [name for name in SWEPT if len({swept(record, name) for record in records}) > 1]
    values = {id(record): [swept(record, name) for name in varied] for record in records}
    found: dict[str, list[RunRecord]] = {}
    for record in sorted(records, key=lambda each: [(value is not None, value or 0.0) for value in values[id(each)]]):
        known = zip(varied, values[id(record)], strict=True)
        text = ", ".join(swept_text(name, value) for name, value in known if value is not None)
        found.setdefault(text, []).append(record)
    return found
