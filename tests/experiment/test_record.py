"""The record of a run: what it holds, when a run is the same run, and what a failure leaves."""

import json

import pytest
import torch

from marginclip.attacks import AllToOne
from marginclip.errors import UserError
from marginclip.experiment import run, stages
from marginclip.experiment.recipe import run_folder
from marginclip.experiment.recording import finished_record
from marginclip.experiment.run import defend
from marginclip.reporting.rows import seconds

PER_CLASS = {"macro_f1", "worst_class"}
CALIBRATION = {"ece", "mce", "nll", "brier"}


def test_record_holds_what_was_asked_run_and_measured(finished):
    runs_dir, done = finished
    content = json.loads(done.path.read_text())
    assert content["status"] == "done"
    assert content["seed"] == content["config"]["seed"] == 0
    assert "${" not in json.dumps(content["config"])
    assert {"python", "torch", "lightning", "marginclip"} <= set(content["versions"])
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["device"]["accelerator"] in ("cpu", "gpu")
    assert content["precision"] == "32-true"
    assert content["clean_set_size"] == 60
    assert set(content["seconds"]) == {"victim", "repair", "detector", "evaluation"}
    assert all(seconds > 0 for seconds in content["seconds"].values())
    assert content["peak_memory_mib"]["process"] > 50
    assert list(content["metrics"]) == ["none", "mmac", "mmdf", "mmdf_repaired", "mmdf_both"]
    backdoor = {"acc", "asr", "pacc"}
    assert set(content["metrics"]["none"]) == set(content["metrics"]["mmac"]) == backdoor | PER_CLASS | CALIBRATION
    assert set(content["metrics"]["mmdf"]) == backdoor | {"fpr", "tpr", "auroc"} | PER_CLASS
    shares = [value for row in content["metrics"].values() for key, value in row.items() if key not in ("nll", "brier")]
    assert all(0 <= value <= 1 for value in shares)
    assert {row: len(each) for row, each in content["per_class"].items()} == {
        "none": 10,
        "mmac": 10,
        "mmdf": 10,
        "mmdf_repaired": 10,
        "mmdf_both": 10,
    }
    assert "training_counts" not in content
    assert content["evaluated_on"] == "held_out"
    assert done.path.is_relative_to(runs_dir)
    assert content["rows"]["mmdf"] == {"label": "MMDF", "phases": ["repair", "detector"]}
    assert content["rows"]["mmdf_repaired"]["label"] == "MMDF, repair decides"
    assert content["rows"]["mmdf_both"]["label"] == "MMDF, both statistics"
    assert content["schema_version"] == 2


def test_everything_is_below_runs_dir_and_whole(finished):
    runs_dir, done = finished
    assert {path.name for path in runs_dir.iterdir()} == {"victims", done.folder.name}
    assert {path.name for path in done.folder.iterdir() if path.name != ".lock"} == {
        "run.json",
        "bounds.safetensors",
        "arrays.safetensors",
    }
    assert not list(runs_dir.rglob("*.partial"))


def test_finished_run_is_not_done_again(finished, configure, monkeypatch):
    runs_dir, done = finished
    monkeypatch.setattr(run, "_do", lambda *_: pytest.fail("the run was done again"))
    again = defend(configure(runs_dir=runs_dir))
    assert again == done


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("logger=csv", True),
        ("figures=true", True),
        ("trainer.enable_progress_bar=true", True),
        ("trainer.cuda_graphs=false", True),
        ("seed=1", False),
        ("training.epochs=3", False),
        ("defense.steps=6", False),
        ("attack.rate=0.2", False),
        ("clean_per_class=7", False),
        ("defense.detector.theta=0.01", False),
    ],
)
def test_a_run_is_another_only_when_its_result_can_be(configure, change, same):
    assert (run_folder(configure()) == run_folder(configure(change))) is same


def test_another_checkpoint_under_the_same_name_is_another_run(configure, tmp_path):
    path = tmp_path / "model.pt"
    overrides = ("victim=checkpoint", f"victim.path={path}")
    path.write_bytes(b"one")
    first = run_folder(configure(*overrides))
    path.write_bytes(b"two")
    assert run_folder(configure(*overrides)) != first
    path.write_bytes(b"one")
    assert run_folder(configure(*overrides)) == first


@pytest.mark.parametrize(
    ("x2x", "accuracy", "success", "status"),
    [
        ("all2one", 0.8, 0.9, "done"),
        ("all2one", 0.8, 0.89, "attack_failed"),
        ("one2one", 0.8, 0.89, "attack_failed"),
        ("all2all", 0.8, 0.73, "done"),  # the trigger can only work where the true class is recognised
        ("all2all", 0.8, 0.71, "attack_failed"),
    ],
)
def test_attack_that_did_not_take_is_marked(configure, monkeypatch, x2x, accuracy, success, status):
    measured = {"none": {"acc": accuracy, "asr": success, "pacc": 0.0}}
    monkeypatch.setattr(stages.Evaluation, "results", lambda _: measured)
    monkeypatch.setattr(run, "load_model", lambda *_: None)
    spec = configure(f"x2x={x2x}", "attack.min_success=0.9", "defense=none")
    done = defend(spec)
    assert json.loads(done.path.read_text())["status"] == status
    assert finished_record(spec) == done


@pytest.mark.parametrize(
    ("error", "reason"),
    [(UserError("the logits are NaN"), "the logits are NaN"), (RuntimeError("lost"), "RuntimeError: lost")],
)
def test_failed_run_leaves_its_reason_and_is_done_when_asked_again(configure, monkeypatch, error, reason):
    spec = configure("defense=static_clip")

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", fail)
        with pytest.raises(type(error), match=str(error)):
            defend(spec)
    left = json.loads((run_folder(spec) / "run.json").read_text())
    assert (left["status"], left["error"]) == ("failed", reason)
    assert left["metrics"] == {}
    again = defend(spec)
    assert again.status == "done"
    assert "error" not in json.loads(again.path.read_text())


def test_without_attack_only_clean_metrics(configure):
    done = defend(configure("attack=none"))
    assert set(done.metrics["none"]) == {"acc"} | PER_CLASS | CALIBRATION
    assert set(done.metrics["mmdf"]) == {"acc", "fpr"} | PER_CLASS


def test_all_held_out_images_as_clean_set_are_also_what_is_evaluated(configure):
    done = defend(configure("clean_per_class=null", "defense=none", "attack=none"))
    assert done.evaluated_on == "clean_set"
    assert done.clean_set_size > 800


def test_the_test_for_a_backdoor_is_recorded(configure):
    content = json.loads(
        defend(configure("detect=mmbd", "detect.starts=2", "detect.steps=2", "attack=badnet")).path.read_text()
    )
    found = content["detection"]
    assert len(found["statistics"]) == 10
    assert found["true_target"] == AllToOne(10, seed=0).target
    assert 0 < found["p_value"] <= 1
    assert content["seconds"]["detection"] > 0


def test_any_defense_takes_a_detector(configure):
    done = defend(
        configure("attack=badnet", "defense=logit_adjustment", "defense.class_counts=known", "+defense/detector=calibrated")
    )
    assert set(done.metrics) == {
        "none",
        "logit_adjustment",
        "logit_adjustment_mmdf",
        "logit_adjustment_mmdf_repaired",
        "logit_adjustment_mmdf_both",
    }
    assert {"fpr", "tpr", "auroc"} <= set(done.metrics["logit_adjustment_mmdf"])
    assert seconds(done, "logit_adjustment_mmdf") > 0
