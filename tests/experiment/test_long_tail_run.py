"""A whole tiny run on an imbalanced training set: its record, its figures, and its summary."""

import json

import pytest
from safetensors.torch import load_file

from marginclip.experiment.run import defend
from marginclip.reporting import load_records, result_table, summarise

SHARES = {"acc", "macro_f1", "worst_class", "medium", "few", "ece", "mce"}


@pytest.fixture
def done(configure):
    """Digits, about 88 images of the most common class and 8 of the rarest."""
    return defend(configure("imbalance=exponential", "imbalance.ratio=10", "figures=true", "logger=csv"))


def test_a_long_tail_run_from_configuration_to_figures(done, tmp_path):
    content = json.loads(done.path.read_text())
    counts = content["training_counts"]
    assert len(counts) == 10
    assert counts == sorted(counts, reverse=True)
    assert 20 <= counts[0] <= 100 and counts[9] == counts[0] // 10
    for row in ("none", "mmac", "mmdf"):
        calibrated = {"ece", "mce", "nll", "brier"} if row != "mmdf" else {"fpr"}
        assert set(content["metrics"][row]) == {"acc", "macro_f1", "worst_class", "medium", "few"} | calibrated
        assert all(isinstance(value, float) for value in content["metrics"][row].values())
        assert all(0 <= content["metrics"][row][key] <= 1 for key in SHARES & set(content["metrics"][row]))
        each = content["per_class"][row]
        few = [value for value, count in zip(each, counts, strict=True) if count < 20]
        assert content["metrics"][row]["few"] == pytest.approx(sum(few) / len(few), abs=1e-5)
        assert content["metrics"][row]["worst_class"] == pytest.approx(min(each), abs=1e-5)
    arrays = load_file(done.folder / "arrays.safetensors")
    confusion = arrays["confusion/none"]
    assert confusion.diagonal().sum() / confusion.sum() == pytest.approx(content["metrics"]["none"]["acc"])
    assert arrays["reliability/mmac"].shape == (15, 3)
    assert "reliability/mmdf" not in arrays
    drawn = {path.name for path in (done.folder / "figures").iterdir()}
    assert {"class_accuracy.png", "confusion.png", "reliability.png"} <= drawn
    assert "none/few" in (done.folder / "csv" / "metrics.csv").read_text()
    headings = [str(column.header) for column in result_table(done).columns]
    assert headings == ["defense", "ACC %", "MEDIUM %", "FEW %", "WORST %", "ECE %", "NLL", "FPR %", "seconds"]
    assert "small_resnet (width 4), exponential 10, clean set of 60" in summarise(load_records(tmp_path / "runs"))
