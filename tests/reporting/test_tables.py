"""The table of one run, against hand-written cells."""

from __future__ import annotations

import io
from functools import partial

import pytest

from marginclip.record import RunRecord
from marginclip.reporting import print_table, result_table
from marginclip.reporting.rows import seconds

ROWS = {
    "none": {"label": "no defense"},
    "mmac": {"label": "MMAC", "phases": ["repair"]},
    "mmdf": {"label": "MMDF", "phases": ["repair", "detector"]},
    "mine": {"label": "my peer", "phases": ["own"]},
}


@pytest.fixture
def attacked(make_record):
    """Makes the record of a backdoored model's run."""
    metrics = {
        "none": {"acc": 0.9141, "asr": 0.9996, "pacc": 0.0},
        "mmac": {"acc": 0.9, "asr": 0.05, "pacc": 0.8},
        "mmdf": {"acc": 0.89, "asr": None, "pacc": float("nan"), "tpr": 0.95, "fpr": 0.005, "auroc": 0.98765},
        "mine": {"acc": 1.0},
    }
    seconds = {"victim": 100.0, "repair": 12.26, "detector": 1.0, "evaluation": 3.0}
    return partial(make_record, rows=ROWS, metrics=metrics, seconds=seconds)


def cells(record: RunRecord) -> dict[str, list[str]]:
    return {str(column.header): [str(cell) for cell in column.cells] for column in result_table(record).columns}


def test_cells_labels_and_missing_values(attacked) -> None:
    assert cells(attacked()) == {
        "defense": ["no defense", "MMAC", "MMDF", "my peer"],
        "ACC %": ["91.4", "90.0", "89.0", "100.0"],
        "ASR %": ["100.0", "5.0", "-", "-"],
        "PACC %": ["0.0", "80.0", "-", "-"],
        "TPR %": ["-", "-", "95.0", "-"],
        "FPR %": ["-", "-", "0.5", "-"],
        "AUC": ["-", "-", "0.988", "-"],
        "seconds": ["-", "12.3", "13.3", "-"],
    }


@pytest.mark.parametrize(("metrics", "said"), [({"none": {"acc": 0.5}}, True), ({"none": {"acc": 0.5, "asr": 0.9}}, False)])
def test_a_table_without_a_trigger_says_that_none_was_tested(make_record, metrics, said) -> None:
    file = io.StringIO()
    print_table(make_record(metrics=metrics), file)
    assert ("no trigger was tested" in " ".join(file.getvalue().split())) is said


def test_columns_without_any_value_are_left_out(make_record) -> None:
    record = make_record(metrics={"none": {"acc": 0.5}, "mmdf": {"acc": 0.5, "fpr": 0.0}})
    assert list(cells(record)) == ["defense", "ACC %", "FPR %"]
    assert cells(record)["FPR %"] == ["-", "0.0"]


def test_a_record_without_metrics_gives_an_empty_table(make_record) -> None:
    assert result_table(make_record(rows={}, repaired_row=None)).row_count == 0


@pytest.mark.parametrize(
    ("row", "timed", "expected"),
    [
        ("none", {"repair": 1.0, "none": 3.0}, None),
        ("mmac", {"repair": 1.0, "detector": 2.0}, 1.0),
        ("mmdf", {"repair": 1.0, "detector": 2.0}, 3.0),
        ("mmdf", {"detector": 2.0}, None),
        ("mmac", {"repair": 0.0}, 0.0),
        ("mine", {"repair": 5.0, "own": 0.5}, 0.5),
    ],
)
def test_seconds_of_a_row_are_those_of_its_phases(row: str, timed: dict, expected: float | None, attacked) -> None:
    assert seconds(attacked(seconds=timed), row) == expected


def test_a_variant_took_the_seconds_of_its_repair(make_record) -> None:
    rows = {"none": {"label": "no defense"}} | {
        row: {"label": row, "phases": ["repair"]} for row in ("fine_pruning_pruned", "fine_pruning")
    }
    record = make_record(
        rows=rows, repaired_row="fine_pruning", metrics={row: {"acc": 0.5} for row in rows}, seconds={"repair": 2.0}
    )
    assert cells(record)["seconds"] == ["-", "2.0", "2.0"]


def test_the_printed_table_fits_80_columns_and_keeps_brackets(attacked) -> None:
    rows = {"clip_mmdf": {"label": "static clip + MMDF", "phases": ["own"]}, "peer": {"label": "peer[bold]"}}
    scores = {"acc": 0.89, "asr": 1.0, "pacc": 1.0, "tpr": 0.95, "fpr": 0.005, "auroc": 0.98765}
    record = attacked(rows=rows, metrics={"clip_mmdf": scores, "peer": {"acc": 1.0}}, seconds={"own": 1000.0})
    file = io.StringIO()
    print_table(record, file)
    text = file.getvalue()
    assert "static clip + MMDF" in text
    assert "peer[bold]" in text
    assert "digits, small_resnet, badnet all2one, seed 0" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_failed_attack_is_said(attacked) -> None:
    file = io.StringIO()
    print_table(attacked(status="attack_failed"), file)
    assert "attack failed" in " ".join(file.getvalue().split())


@pytest.mark.parametrize(("evaluated_on", "said"), [("clean_set", True), ("held_out", False)])
def test_a_measurement_on_the_clean_set_is_said(evaluated_on: str, said: bool, attacked) -> None:
    file = io.StringIO()
    print_table(attacked(evaluated_on=evaluated_on), file)
    assert ("on the clean set itself" in " ".join(file.getvalue().split())) is said


@pytest.fixture
def long_tailed(make_record):
    """Makes the record of an imbalanced run without attack; groups of its configuration can be changed."""

    def make(*, asr=None, **config):
        scores = {
            "acc": 0.7,
            "many": 0.9,
            "few": 0.1,
            "worst_class": 0.0,
            "ece": 0.123,
            "nll": 1.23456,
            "mce": 0.5,
            "brier": 0.4,
        }
        settings = {"attack": {"name": "none"}, "imbalance": {"name": "exponential", "ratio": 100}}
        metrics = {"none": scores | {"asr": asr}, "mmdf": {"acc": 0.75, "fpr": 0.01}}
        return make_record(config=settings | config, metrics=metrics)

    return make


def test_long_tailed_runs_show_common_and_rare_classes_and_calibration(long_tailed) -> None:
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
def test_backdoor_runs_keep_their_columns(config: dict, shown: bool, long_tailed) -> None:
    record = long_tailed(asr=0.9, **config)
    assert ("NLL" in cells(record)) is ("WORST %" in cells(record)) is shown
    assert "ASR %" in cells(record)


def test_the_title_names_imbalance_and_loss(long_tailed) -> None:
    record = long_tailed(loss={"name": "mixup"})
    assert result_table(record).title == "digits, small_resnet, exponential 100, mixup, no attack, seed 0"
    assert result_table(long_tailed(imbalance={"name": "none"})).title == "digits, small_resnet, no attack, seed 0"
