"""Victims: trained once for a recipe, resumed where interrupted, different for different seeds."""

import csv

import pytest
import torch
from safetensors.torch import load_file

from marginclip.experiment.recipe import find_victim
from marginclip.experiment.run import defend
from marginclip.experiment.setup import build_setup
from marginclip.experiment.store import VictimStore
from marginclip.experiment.training_time import TrainingTime
from marginclip.experiment.victim import obtain_victim
from marginclip.training import PoisonedTraining


def obtain(spec):
    victim, trained_now = obtain_victim(spec, build_setup(spec))
    return load_file(victim.weights), trained_now, victim


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def interrupt(monkeypatch, owner, at, error=KeyboardInterrupt):
    """Let ``owner.training_step`` raise before the ``at``-th step."""
    step = owner.training_step

    def failing(self, batch, batch_idx):
        if self.global_step == at:
            raise error("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(owner, "training_step", failing)


def test_same_config_finds_its_victim(configure, monkeypatch):
    spec = configure()
    weights, trained_now, victim = obtain(spec)
    assert trained_now
    assert victim.record["recipe"]["attack"]["name"] == "badnet"
    assert set(victim.record["metrics"]) == {"acc", "asr", "pacc"}
    assert not victim.checkpoint.exists()
    monkeypatch.setattr("marginclip.experiment.victim.train_victim", lambda *_: pytest.fail("trained again"))
    setup = build_setup(spec)
    found, trained_again = obtain_victim(spec, setup)
    assert not trained_again
    assert found == victim
    assert equal(setup.model.state_dict(), weights)


@pytest.mark.parametrize("name", ["train", "defend"])
def test_small_classes_limit_the_automatic_sizes(configure, name):
    """The digits' smallest class holds out fewer than a hundred images: half of them are for evaluation."""
    data = build_setup(configure("clean_per_class=auto", name=name)).data
    held_out = data.splits.held_out.labels
    half = int(held_out.bincount().min()) // 2
    assert half < 50
    assert held_out[data.clean_index].bincount().tolist() == [half] * 10
    assert len(data.eval_index) == len(held_out) - 10 * half


def test_train_and_defend_share_the_store(configure):
    assert find_victim(configure(name="train")) == find_victim(configure("attack.min_success=0.5"))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (("attack.min_success=0.3",), True),
        (("defense=none",), True),
        (("clean_per_class=3",), True),
        (("attack.rate=0.2",), False),
        (("x2x=all2all",), False),
        (("x2x.target=3",), False),
        (("model.width=5",), False),
        (("training.optimizer.lr=0.05",), False),
        (("dataset.split_seed=1",), False),
        (("dataset.augment.crop_padding=0",), False),
        (("seed=1",), False),
        (("trainer.precision=bf16-mixed",), False),
    ],
)
def test_recipe_changes_with_what_training_depends_on(configure, change, same):
    assert (find_victim(configure(*change)) == find_victim(configure())) is same


def test_x2x_does_not_matter_without_an_attack(configure):
    none = ("attack=none",)
    assert find_victim(configure(*none, "x2x=all2all")) == find_victim(configure(*none, "x2x=one2one"))


def test_victim_without_its_record_is_not_trained(tmp_path):
    victim = VictimStore(tmp_path).find("name", {"a": 1})
    assert victim.record is None
    victim.save(torch.nn.Linear(1, 1), None, {"metrics": {}})
    assert victim.record == {"metrics": {}}
    (victim.folder / "victim.json").unlink()
    assert victim.record is None


@pytest.mark.parametrize("step", [3, 9])  # eight steps an epoch: before the first checkpoint, and behind it
def test_interrupted_training_ends_in_the_same_weights(configure, tmp_path, monkeypatch, step):
    through, *_ = obtain(configure(runs_dir=tmp_path / "through"))
    spec = configure(runs_dir=tmp_path / "interrupted")
    with monkeypatch.context() as patch:
        interrupt(patch, PoisonedTraining, step, RuntimeError)
        patch.setattr(TrainingTime, "state_dict", lambda self: {"seconds": 1000.0})
        with pytest.raises(RuntimeError, match="power cut"):
            obtain(spec)
    victim = find_victim(spec)
    assert victim.record is None
    assert not victim.weights.exists()
    assert victim.checkpoint.exists() is (step > 8)
    resumed, trained_now, _ = obtain(spec)
    assert trained_now
    assert equal(resumed, through)
    assert (find_victim(spec).record["seconds"] >= 1000) is (step > 8)  # those before the interruption count


def test_seeds_differ_and_repeat(configure, tmp_path):
    zero, *_ = obtain(configure(runs_dir=tmp_path / "zero"))
    again, *_ = obtain(configure(runs_dir=tmp_path / "again"))
    one, *_ = obtain(configure("seed=1", runs_dir=tmp_path / "zero"))
    assert equal(zero, again)
    assert not equal(zero, one)


def test_interrupted_repair_ends_in_the_same_bounds_and_metrics(configure, tmp_path, monkeypatch):
    from marginclip.defenses import BoundLearning

    through = defend(configure("defense.detector.folds=0", runs_dir=tmp_path / "through"))
    spec = configure("defense.detector.folds=0", runs_dir=tmp_path / "interrupted")
    with monkeypatch.context() as patch:
        interrupt(patch, BoundLearning, 3, RuntimeError)
        patch.setattr(TrainingTime, "state_dict", lambda self: {"seconds": 1000.0})
        with pytest.raises(RuntimeError, match="power cut"):
            defend(spec)
    resumed = defend(spec)
    assert not (resumed.folder / "checkpoint").exists()
    assert resumed.victim.trained_now is False
    assert equal(load_file(resumed.folder / "bounds.safetensors"), load_file(through.folder / "bounds.safetensors"))
    assert resumed.seconds["repair"] >= 1000 > through.seconds["repair"]
    assert resumed.metrics == through.metrics
    assert resumed.history == through.history


def test_rows_of_an_interrupted_training_are_kept(configure, monkeypatch):
    spec = configure("logger=csv", "attack=none", "training.batch_size=32", "trainer.log_every_n_steps=1")
    with monkeypatch.context() as patch:
        interrupt(patch, PoisonedTraining, 50, RuntimeError)
        with pytest.raises(RuntimeError, match="power cut"):
            obtain(spec)
    folder = obtain(spec)[2].folder / "csv"
    earlier, later = (
        [row["epoch"] for row in csv.DictReader((folder / name).open())] for name in ("metrics-1.csv", "metrics.csv")
    )
    assert set(earlier) >= {"0"}
    assert set(later) == {"1"}
