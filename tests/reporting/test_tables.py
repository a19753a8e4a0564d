"""The table of one run, against hand-written cells."""

from __future__ import annotations

import io

import pytest

from marginclip.reporting import print_table, result_table
from marginclip.reporting.rows import seconds


def attacked() -> dict:
    return {
        "config": {"dataset": {"name": "digits"}, "attack": {"name": "badnet"}, "x2x": {"name": "all2one"}, "seed": 0},
        "metrics": {
            "none": {"acc": 0.9141, "asr": 0.9996, "pacc": 0.0},
            "mmac": {"acc": 0.9, "asr": 0.05, "pacc": 0.8},
            "mmdf": {"acc": 0.89, "asr": None, "pacc": float("nan"), "tpr": 0.95, "fpr": 0.005, "auroc": 0.98765},
            "my_peer": {"acc": 1.0},
        },
        "seconds": {"victim": 100.0, "repair": 12.26, "detector": 1.0, "evaluation": 3.0},
    }


def cells(record: dict) -> dict[str, list[str]]:
    return {str(column.header): [str(cell) for cell in column.cells] for column in result_table(record).columns}


def test_cells_labels_and_missing_values() -> None:
    assert cells(attacked()) == {
        "defense": ["no defense", "MMAC", "MMDF", "my_peer"],
        "ACC %": ["91.4", "90.0", "89.0", "100.0"],
        "ASR %": ["100.0", "5.0", "-", "-"],
        "PACC %": ["0.0", "80.0", "-", "-"],
        "TPR %": ["-", "-", "95.0", "-"],
        "FPR %": ["-", "-", "0.5", "-"],
        "AUC": ["-", "-", "0.988", "-"],
        "seconds": ["-", "12.3", "13.3", "-"],
    }


def test_columns_without_any_value_are_left_out() -> None:
    record = {"metrics": {"none": {"acc": 0.5}, "mmdf": {"acc": 0.5, "fpr": 0.0}}}
    assert list(cells(record)) == ["defense", "ACC %", "FPR %"]
    assert cells(record)["FPR %"] == ["-", "0.0"]


@pytest.mark.parametrize("record", [{}, {"metrics": None}, {"metrics": {}}])
def test_a_record_without_metrics_gives_an_empty_table(record: dict) -> None:
    assert result_table(record).row_count == 0


@pytest.mark.parametrize(
    ("row", "timed", "expected"),
    [
        ("none", {"repair": 1.0, "none": 3.0}, None),
        ("mmac", {"repair": 1.0, "detector": 2.0}, 1.0),
        ("mmdf", {"repair": 1.0, "detector": 2.0}, 3.0),
        ("mmdf", {"detector": 2.0}, None),
        ("mmac", {"repair": 0}, 0.0),
        ("nad", {"repair": 5.0, "nad": 7.0}, 5.0),
        ("nad_mmdf", {"repair": 5.0, "detector": 2.0}, 7.0),
        ("static_clip", {"repair": 5.0, "static_clip": 0.5}, 0.5),
        ("static_clip", {"repair": 5.0}, None),
    ],
)
def test_seconds_of_a_row_are_those_of_its_phases(row: str, timed: dict, expected: float | None) -> None:
    defense = {"name": "nad", "repaired_row": "nad", "detector_row": "nad_mmdf"}
    assert seconds({"config": {"defense": defense}, "seconds": timed}, row) == expected


def test_the_printed_table_fits_80_columns_and_keeps_brackets() -> None:
    record = attacked()
    record["metrics"] = {"static_clip_mmdf": record["metrics"]["mmdf"] | {"asr": 1.0, "pacc": 1.0}, "peer[bold]": {"acc": 1.0}}
    record["seconds"] = {"static_clip_mmdf": 1000.0}
    file = io.StringIO()
    print_table(record, file)
    text = file.getvalue()
    assert "static clip + MMDF" in text
    assert "peer[bold]" in text
    assert "digits, badnet all2one, seed 0" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_failed_attack_is_said() -> None:
    file = io.StringIO()
    print_table(attacked() | {"status": "attack_failed"}, file)
    assert "attack failed" in " ".join(file.getvalue().split())


@pytest.mark.parametrize(("evaluated_on", "said"), [("clean_set", True), ("held_out", False)])
def test_a_measurement_on_the_clean_set_is_said(evaluated_on: str, said: bool) -> None:
    file = io.StringIO()
    print_table(attacked() | {"status": "done", "evaluated_on": evaluated_on}, file)
    assert ("on the clean set itself" in " ".join(file.getvalue().split())) is said


def long_tailed(**config: object) -> dict:
    before = {"acc": 0.7, "many": 0.9, "few": 0.1, "worst_class": 0.0, "ece": 0.123, "nll": 1.23456, "mce": 0.5, "brier": 0.4}
    settings = {"attack": {"name": "none"}, "imbalance": {"name": "exponential", "ratio": 100}}
    return {"config": settings | config, "metrics": {"none": before, "mmdf": {"acc": 0.75, "fpr": 0.01}}}


def test_long_tailed_runs_show_common_and_rare_classes_and_calibration() -> None:
    assert cells(long_tailed()) == {
        "defense": ["no defense", "MMDF"],
        "ACC %": ["70.0", "75.0"],
        "MANY %": ["90.0", "-"],  # no class is medium: no such column
        "FEW %": ["10.0", "-"],
        "WORST %": ["0.0", "-"],
        "ECE %": ["12.3", "-"],
        "NLL": ["1.235", "-"],
        "FPR %": ["-", "1.0"],
    }


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({}, True),
        ({"imbalance": {"name": "none"}}, True),  # no attack
        ({"attack": {"name": "badnet"}}, True),  # imbalanced
        ({"attack": {"name": "badnet"}, "imbalance": {"name": "none"}}, False),
        ({"attack": {"name": "badnet"}, "imbalance": None}, False),
    ],
)
def test_backdoor_runs_keep_their_columns(config: dict, shown: bool) -> None:
    record = long_tailed(**config)
    record["metrics"]["none"]["asr"] = 0.9
    assert ("NLL" in cells(record)) is ("WORST %" in cells(record)) is shown
    assert "ASR %" in cells(record)


def test_the_title_names_imbalance_and_loss() -> None:
    record = long_tailed(dataset={"name": "cifar10"}, loss={"name": "mixup"}, seed=0)
    assert result_table(record).title == "cifar10, exponential 100, mixup, no attack, seed 0"
    record = long_tailed(dataset={"name": "cifar10"}, loss={"name": "cross_entropy"}, imbalance={"name": "none"})
    assert result_table(record).title == "cifar10, no attack"
