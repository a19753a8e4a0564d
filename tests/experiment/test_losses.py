"""Victims of other losses: their place in the store, both stages through interruptions, the entry points, mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from marginclip import losses
from marginclip.errors import UserError
from marginclip.experiment.command import plain
from marginclip.experiment.recipe import find_victim, run_folder
from marginclip.experiment.run import defend
from marginclip.experiment.setup import build_setup
from marginclip.experiment.spec import run_spec
from marginclip.experiment.store import Victim
from marginclip.experiment.victim import make_training, obtain_victim
from marginclip.losses import CosineLinear, Mixup, SecondStage
from marginclip.training import HeadTraining, JointTraining, LongTailTraining, PoisonedTraining

CONF = Path(__file__).parents[2] / "conf"
GCL = (
    "loss=gcl",
    "imbalance=exponential",
    "imbalance.ratio=10",
    "training=long_tail",
    "training.batch_size=64",
    "loss.second_stage.epochs=2",
)


def obtain(spec):
    setup = build_setup(spec)
    victim, _ = obtain_victim(spec, setup)
    return setup, victim


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -- the same recipe is the same victim ----------------------------------------------------------------------------------------

# Places of victims: a change of these trains every victim of every user anew. An adaptive one has the settings of the defense it knows.
PINNED = [
    (("attack=badnet", "dataset=mnist_subset"), "mnist_subset-small_resnet-badnet-all2one-seed0-688b3da42f"),
    (
        ("attack=none", "imbalance=exponential", "dataset=digits", "seed=3"),
        "digits-small_resnet-exponential100-none-seed3-f7e401f987",
    ),
    (("attack=wanet", "dataset=mnist_subset"), "mnist_subset-small_resnet-wanet-all2one-seed0-75fab758e3"),
    (
        ("attack=adaptive", "attack.beta=10", "attack.unbounded_weight=1", "defense/schedule@attack.defender=tight_start"),
        "mnist_m-small_resnet-adaptive-all2one-seed0-4acb3c5cb6",
    ),
    (("attack=adaptive",), "mnist_m-small_resnet-adaptive-all2one-seed0-b40f959f59"),
]


@pytest.mark.parametrize(("overrides", "victim"), PINNED)
def test_victims_are_found_again_under_their_names(overrides, victim):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        spec = run_spec(plain(compose("defend", overrides=list(overrides))))
    assert find_victim(spec).folder.name == victim


def test_another_loss_is_another_victim_and_its_name_says_so(configure):
    names = {find_victim(configure(f"loss={loss}", "attack=none")).folder.name for loss in ("cross_entropy", "mixup", "gcl")}
    names |= {find_victim(configure("loss=gcl", "attack=none", "loss.scale=20")).folder.name}
    assert len(names) == 4
    assert sum("-mixup-none-" in name for name in names) == 1
    assert sum("-gcl-none-" in name for name in names) == 2
    runs = {run_folder(configure(f"loss={loss}", "attack=none")).name for loss in ("cross_entropy", "mixup", "gcl")}
    assert len(runs) == 3


@pytest.mark.parametrize(
    ("overrides", "module"),
    [
        (("attack=none",), PoisonedTraining),
        (("imbalance=step",), LongTailTraining),
        (("imbalance=step", "attack=badnet"), LongTailTraining),
        (("imbalance=step", "attack=input_aware"), JointTraining),
    ],
)
def test_imbalance_chooses_the_module_that_watches_rare_classes(configure, overrides, module):
    spec = configure(*overrides)
    assert type(make_training(spec, build_setup(spec))) is module


# -- two stages ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def through(tmp_path_factory, configure_at):
    """A GCL victim trained without an interruption: (its setup, its place, the place of its first stage)."""
    spec = configure_at(tmp_path_factory.mktemp("through") / "runs", *GCL)
    setup, victim = obtain(spec)
    return setup, victim, find_victim(replace(spec, loss=spec.loss.changed(second_stage=None)))


def test_the_second_stage_goes_on_from_the_first_which_is_a_victim_too(through):
    setup, victim, first = through
    assert isinstance(setup.model.linear, CosineLinear)
    assert victim.record["first_stage"] == first.folder.name
    assert set(first.record["metrics"]) == set(victim.record["metrics"]) == {"acc"}
    one, other = load_file(first.weights), load_file(victim.weights)
    assert {name for name in one | other if not torch.equal(one[name], other[name])} == {"linear.weight", "linear.scale"}
    assert (float(one["linear.scale"]), float(other["linear.scale"])) == (30, 20)
    assert equal(setup.model.state_dict(), other)


def power_cut(monkeypatch, module, at):
    """Let trainings with exactly this ``module`` fail before the ``at``-th step."""
    step = PoisonedTraining.training_step

    def failing(self, batch, batch_idx):
        if type(self) is module and self.global_step == at:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(module, "training_step", failing)


@pytest.mark.parametrize("stage", [LongTailTraining, HeadTraining])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_interruption_in_either_stage_changes_no_bit(through, configure, monkeypatch, stage, epoch):
    _, victim, first = through
    spec = configure(*GCL)
    with monkeypatch.context() as patch:
        steps = len(build_setup(spec).data.train_dataloader())
        assert steps > 2
        power_cut(patch, stage, epoch * steps + 1)
        with pytest.raises(RuntimeError, match="power cut"):
            obtain(spec)
    found = find_victim(spec)
    own = Victim(found.folder.parent / first.folder.name)
    assert found.record is None
    assert (own.record is None) is (stage is LongTailTraining)
    assert (own if stage is LongTailTraining else found).checkpoint.exists() is (epoch == 1)
    obtain(spec)
    assert equal(load_file(own.weights), load_file(first.weights))
    assert equal(load_file(found.weights), load_file(victim.weights))


def test_the_first_stage_alone_is_found_again(through, configure_at, monkeypatch):
    _, victim, first = through
    monkeypatch.setattr("marginclip.experiment.victim.train_victim", lambda *_: pytest.fail("trained again"))
    spec = configure_at(victim.folder.parents[1], *GCL, "loss.second_stage=null")
    setup, found = obtain(spec)
    assert found == first
    assert equal(setup.model.state_dict(), load_file(first.weights))


def test_a_poisoned_victim_of_two_stages_keeps_its_trigger(configure):
    setup, victim = obtain(configure("loss=gcl", "attack=badnet", "training.epochs=1"))
    assert set(victim.record["metrics"]) == {"acc", "asr", "pacc"}
    assert isinstance(setup.model.linear, CosineLinear)


# -- entry points --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mixup", "gcl", "ldam"])
def test_train_runs_for_one_epoch(job, tmp_path, loss):
    overrides = ("imbalance=exponential", f"loss={loss}", "training=long_tail", "training.epochs=1", "model.width=4")
    code, out, err = job(*overrides, script="train")
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / out.splitlines()[-1]).read_text())
    assert record["recipe"]["loss"]["name"] == loss
    assert 0 <= record["metrics"]["acc"] <= 1


def test_defend_repairs_a_network_with_a_cosine_classifier(through, configure_at):
    _, victim, _ = through
    done = defend(configure_at(victim.folder.parents[1], *GCL, "defense=mmac"))
    assert done.status == "done"
    assert (done.victim.folder, done.victim.trained_now) == (str(victim.folder), False)
    assert set(done.metrics) == {"none", "mmac"}
    assert done.metrics["none"]["acc"] == victim.record["metrics"]["acc"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=gcl", "loss.scale=0"], "loss=gcl: scale must be positive, got 0"),
        (["loss=gcl", "loss.scale=wide"], "loss.scale must be a number, got 'wide'"),
        (["loss=gcl", "loss.second_stage.loss.margin=-1"], "loss=gcl: margin must be a number from 0 up, got -1"),
        (["loss=gcl", "loss.second_stage.epochs=2.5"], "loss.second_stage.epochs must be a whole number from 1 up, or a share"),
        (["loss=mixup", "loss.alpha=0"], "loss=mixup: alpha must be positive, got 0"),
        (["loss=mixup", "training.label_smoothing=0.1"], "training.label_smoothing acts on loss=cross_entropy alone"),
        (["training=long_tail", "training.scheduler.milestones=[0.9,0.8]"], "training.scheduler.milestones must be positive"),
        (
            ["imbalance=step", "training.epochs=4", "training.batch_size=500"],
            "training.scheduler cannot be spread over 4 steps",
        ),
        (
            ["loss=gcl", "attack=input_aware"],
            "loss=gcl does not go with attack=input_aware, which trains the victim in its own",
        ),
        (["loss=mixup", "attack=adaptive"], "loss=mixup does not go with attack=adaptive, which trains the victim in its own"),
    ],
)
def test_a_mistake_is_one_sentence(job, overrides, message):
    code, _, err = job(*overrides, script="train")
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


# -- models that somebody else trained, and settings that do not fit ----------------------------------------------------------


def test_a_checkpoint_with_a_cosine_classifier_is_repaired(through, configure):
    """No training images are known then, and none are needed."""
    _, victim, _ = through
    spec = configure("loss=gcl", "attack=none", "victim=checkpoint", f"victim.path={victim.weights}", "defense=bias_only")
    setup = build_setup(spec)
    setup.model.load_state_dict(load_file(victim.weights))
    assert isinstance(setup.model.linear, CosineLinear)
    content = json.loads(defend(spec).path.read_text())
    assert content["status"] == "done"
    assert "training_counts" not in content
    assert set(content["metrics"]) == {"none", "bias_only"}


def test_a_second_stage_keeps_the_first_ones_classifier():
    with pytest.raises(UserError, match=r"^loss.second_stage.loss must go on with the classifier of the first stage"):
        Mixup(second_stage=SecondStage(loss=losses.GCL()))
    assert Mixup(second_stage=SecondStage(loss=Mixup())).second_stage is not None


@pytest.mark.parametrize("ratio", ["abc", "null", "true"])
def test_a_ratio_of_another_type_is_one_sentence(configure, ratio):
    with pytest.raises(UserError, match=r"^imbalance.ratio must be"):
        defend(configure("imbalance=exponential", f"imbalance.ratio={ratio}"))
