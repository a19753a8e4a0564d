"""The contract that every defense holds to, whatever it does: found by the files in conf/defense."""

import copy
import functools
import inspect
import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from marginclip.defenses import Defense, LearningDefense, RepairResult
from marginclip.experiment.command import plain
from marginclip.experiment.spec import run_spec
from marginclip.experiment.stages import make_methods
from marginclip.silence import silent_trainer


def make_defense(config):
    """The defense of a composed configuration."""
    return make_methods(run_spec(plain(config))).defense


CONF = Path(__file__).parents[2] / "conf"
OPTIONS = [f"defense={path.stem}" for path in sorted((CONF / "defense").glob("*.yaml")) if path.stem != "none"]
SCHEDULES = [f"defense/schedule={path.stem}" for path in sorted((CONF / "defense" / "schedule").glob("*.yaml"))]
CASES = [[option] for option in OPTIONS] + [["defense=mmac", schedule] for schedule in SCHEDULES]
CASES += [["defense=neural_cleanse", "defense.suspect_class=1"]]  # auto may leave so small a network as it is
CASES += [["defense=auto", "defense.detection.alpha=0.999", "defense.max_cost=1"]]  # auto keeps MMAC
FEW = {
    "epochs": 1,
    "teacher_epochs": 1,
    "steps": 2,
    "extra_steps": 2,
    "check_every": 1,
    "ascent.first_steps": 2,
    "ascent.steps": 1,
    "ascent.starts_per_class": 2,
    "rounds": 2,
    "inversion.passes": 2,
    "inversion.batches_per_pass": 2,
    "detection.starts": 2,
    "detection.steps": 2,
    "detection.simulations": 100,
}
FEW |= {f"{repair}.{key}": value for repair in ("mmac", "mmom") for key, value in FEW.items()}  # the nested ones of auto


@functools.cache
def composed(*overrides):
    """The configuration of a command line, its defense shortened to an epoch or two steps where it takes some."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("defend", overrides=list(overrides))
    for key, value in FEW.items():
        if OmegaConf.select(config.defense, key) is not None:
            OmegaConf.update(config.defense, key, value)
    return config


def make(overrides):
    """The defense of a command line."""
    return make_defense(composed(*overrides))


def fingerprint(model):
    """Everything about a model that a defense must leave alone."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(name, module.training) for name, module in model.named_modules()]
    gradients = [(name, value.requires_grad, value.grad is None) for name, value in model.named_parameters()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return state, flags, gradients, hooks


def assert_same(one, other):
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_model_that_was_given_is_left_as_it_was(victim, clean, overrides):
    victim.train()
    victim[1].eval()  # a frozen batch norm inside a network in training mode
    victim[0].weight.requires_grad_(False)
    before = fingerprint(victim)
    repaired = make(overrides).fit(victim, *clean).network
    assert_same(before, fingerprint(victim))
    repaired(clean[0])
    assert_same(before, fingerprint(victim))


@pytest.mark.parametrize("option", OPTIONS)
def test_labels_can_be_whole_numbers_of_any_type(victim, clean, option):
    images, labels = clean
    short, long = (make([option]).fit(victim, images, labels.to(kind)).network for kind in (torch.int16, torch.int64))
    assert torch.equal(short(images), long(images))


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_repaired_is_another_module_that_shares_no_memory(victim, clean, overrides):
    repaired = make(overrides).fit(victim, *clean).network
    assert repaired is not victim
    assert not repaired.training
    ours, theirs = ({value.untyped_storage().data_ptr() for value in net.state_dict().values()} for net in (repaired, victim))
    assert not ours & theirs
    modules = {id(module) for module in victim.modules()}
    assert not [module for module in repaired.modules() if id(module) in modules]
    before = repaired(clean[0])
    with torch.no_grad():
        for value in victim.parameters():
            value.fill_(7)
    assert torch.equal(repaired(clean[0]), before)


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_repaired_gives_finite_logits_and_survives_a_copy(victim, clean, overrides):
    repaired = make(overrides).fit(victim, *clean).network
    logits = repaired(clean[0])
    assert logits.shape == (24, 4)
    assert torch.isfinite(logits).all()
    assert torch.equal(copy.deepcopy(repaired)(clean[0]), logits)


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_same_seed_same_result(victim, clean, overrides):
    one, other = (make([*overrides, "seed=3"]).fit(victim, *clean).network for _ in range(2))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_a_defense_used_again_begins_anew(victim, clean, overrides):
    """A loop over models with one defense object gives what a new object for each gives."""
    images, labels = clean
    other = copy.deepcopy(victim)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    used, new = make([*overrides, "seed=3"]), make([*overrides, "seed=3"])
    used.fit(other, images.flip(0), labels.flip(0))
    again, fresh = used.fit(victim, *clean), new.fit(victim, *clean)
    assert all(torch.equal(value, again.network.state_dict()[name]) for name, value in fresh.network.state_dict().items())
    assert {**again.findings, "seconds": None} == {**fresh.findings, "seconds": None}
    assert again.history == fresh.history


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_a_result_says_everything_and_the_defense_what_it_is(victim, clean, overrides):
    defense = make(overrides)
    result = defense.fit(victim, *clean)
    assert isinstance(result, RepairResult)
    json.dumps(result.findings, allow_nan=False)  # it goes into the record
    json.dumps(result.history, allow_nan=False)
    assert all(isinstance(value, torch.Tensor) for value in result.arrays.values())
    assert all(variant.label and variant.network(clean[0]).shape == (24, 4) for variant in result.variants.values())
    assert defense.label and defense.label != "learned bounds"
    assert defense.clean_per_class in (50, 100, 200, 500)
    assert all(hasattr(defense, name) for name in defense.oracles)


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_without_gradients_and_leaves_them_off(victim, clean, overrides, mode):
    before = torch.get_rng_state()
    with mode():
        images = clean[0] + 0  # in inference mode an inference tensor
        repaired = make(overrides).fit(victim, images, clean[1]).network
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert torch.isfinite(repaired(images)).all()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_clean_set_is_left_as_it_was(victim, clean, overrides):
    images, labels = clean
    before = images.clone(), labels.clone()
    make(overrides).fit(victim, images, labels)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


def constructor_arguments(cls):
    """The arguments of a constructor, those that it hands on as ``**settings`` included."""
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())
            yield from (parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD)
            if parameters[-1].kind is not parameters[-1].VAR_KEYWORD:
                break


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_a_defense_cannot_be_given_triggers_or_test_data(overrides):
    defense = make(overrides)
    assert isinstance(defense, Defense)
    taken = list(inspect.signature(defense.fit).parameters)
    assert taken == ["model", "images", "labels", "make_trainer", "resume"]
    assert not isinstance(defense, LearningDefense) or list(inspect.signature(defense.prepare).parameters) == taken[:3]
    settings = list(constructor_arguments(type(defense)))
    assert all(setting.kind is inspect.Parameter.KEYWORD_ONLY for setting in settings if setting.name != "self")
    forbidden = ("attack", "trigger", "poison", "target", "x2x", "test", "eval", "setup", "cfg", "config")
    assert not [setting.name for setting in settings if any(word in setting.name for word in forbidden)]


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_works_in_mixed_precision(victim, clean, overrides):
    def trainer(epochs):
        return silent_trainer(epochs, precision="bf16-mixed", accelerator="cpu")

    repaired = make(overrides).fit(victim, *clean, make_trainer=trainer).network
    assert torch.isfinite(repaired(clean[0])).all()
    assert all(value.dtype == torch.float32 for value in repaired.parameters())
