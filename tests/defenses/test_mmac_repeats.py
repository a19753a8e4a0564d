"""Bounds that are learned several times: the loosest of each activation is kept, and nothing but the seed differs."""

import pytest
import torch

from marginclip.clipping import BoundedNetwork
from marginclip.defenses import MMAC, AscentPlan, BoundStart
from marginclip.defenses.clipping.mmac import SEEDS_APART, loosest
from marginclip.defenses.clipping.passes import passes_of
from marginclip.defenses.cross_fitting import cross_fitted
from marginclip.errors import UserError


def make(**settings):
    plan = AscentPlan(starts_per_class=2, steps=1, first_steps=1)
    return MMAC(
        **({"steps": 6, "extra_steps": 0, "check_every": 2, "batch_size": 12, "keep": "last", "ascent": plan} | settings)
    )


def loosest_of(states):
    return {name: torch.stack([state[name] for state in states]).max(0).values for name in states[0]}


def same(states, others):
    return states.keys() == others.keys() and all(torch.equal(states[name], others[name]) for name in states)


def test_every_activation_keeps_the_loosest_of_its_bounds(victim, clean, fit):
    several = fit(make(repeats=3, seed=4), victim, clean)
    assert isinstance(several, BoundedNetwork)
    single = [fit(make(seed=4 + SEEDS_APART * repeat), victim, clean).bounds_state() for repeat in range(3)]
    assert not same(single[0], single[1])
    assert not same(loosest_of(single), single[0])
    assert same(several.bounds_state(), loosest_of(single))


def test_lower_bounds_keep_the_smallest():
    first = {"act.upper": torch.tensor([1.0, 3.0]), "act.lower": torch.tensor([-1.0, -3.0])}
    second = {"act.upper": torch.tensor([2.0, 1.0]), "act.lower": torch.tensor([-2.0, -1.0])}
    found = loosest([first, second])
    assert found["act.upper"].tolist() == [2, 3]
    assert found["act.lower"].tolist() == [-2, -3]


def test_an_object_repairs_several_models_and_keeps_its_seed(victim, plain_victim, clean, fit):
    defense = make(repeats=2, seed=1)
    fit(defense, plain_victim, clean)
    assert defense.seed == 1
    again = fit(defense, victim, clean)
    assert same(again.bounds_state(), fit(make(repeats=2, seed=1), victim, clean).bounds_state())


def test_a_seed_is_put_back_where_a_repeat_fails(victim, clean):
    defense = make(repeats=2, seed=1)
    images, labels = clean
    with pytest.raises(UserError, match=r"NaN|finite"):
        defense.fit(victim, images * float("nan"), labels)
    assert defense.seed == 1


@pytest.mark.parametrize("at", [3, 5])
def test_interrupted_is_bit_for_bit_the_uninterrupted(victim, clean, at, fit, interrupted_and_resumed, monkeypatch):
    straight = make(repeats=3, seed=3)
    bounds = fit(straight, victim, clean).bounds_state()
    learned, repeat = [], MMAC._repeat
    monkeypatch.setattr(MMAC, "_repeat", lambda self, number, *given: learned.append(number) or repeat(self, number, *given))
    resumed, again = interrupted_and_resumed(lambda: make(repeats=3, seed=3), victim, clean, at=at)
    assert same(bounds, resumed.bounds_state())
    assert again.findings() == straight.findings()
    assert learned == [1, 2]  # the resumed repair took them from its checkpoint


def test_a_checkpoint_of_an_earlier_version_has_them_learned_again(victim, clean, fit, interrupted_and_resumed, monkeypatch):
    bounds = fit(make(repeats=2, seed=3), victim, clean).bounds_state()
    monkeypatch.setattr(MMAC, "on_save_checkpoint", MMAC.__mro__[1].on_save_checkpoint)
    resumed, _ = interrupted_and_resumed(lambda: make(repeats=2, seed=3), victim, clean, at=3)
    assert same(bounds, resumed.bounds_state())


def test_relaxed_repeats_count_only_where_all_are(victim, clean, monkeypatch):
    """A repeat that did not keep the accuracy was moved towards the clean maxima, where a trigger may be back."""
    shares, states = [], []
    relax = MMAC.__mro__[1].repaired

    def relaxing(self):
        network = relax(self)
        self.relaxed = shares[len(states)]
        states.append(network.bounds_state())
        return network

    monkeypatch.setattr(MMAC.__mro__[1], "repaired", relaxing)
    for shares[:], kept in (([0.5, 0.0, 0.0], [1, 2]), ([0.5, 0.2, 0.0], [2]), ([0.5, 0.2, 0.1], [0, 1, 2])):
        states.clear()
        network = make(repeats=3).fit(victim, *clean).network
        assert same(network.bounds_state(), loosest_of([states[place] for place in kept]))


def test_the_findings_tell_of_every_repeat(victim, clean):
    assert "other_repeats" not in make().fit(victim, *clean).findings
    start = BoundStart(constant=1e-3)
    findings = make(repeats=3, keep="best", start=start, learning_rate=1e-4).fit(victim, *clean).findings
    assert [entry["bound_steps"] for entry in findings["other_repeats"]] == [6, 6]
    assert all(entry["relaxed"] > 0 for entry in (findings, *findings["other_repeats"]))


def test_folds_are_learned_as_often(victim, clean):
    images, labels = clean
    fitted = cross_fitted(make(repeats=2, seed=2), victim, images, labels, folds=2)
    defense = make(repeats=2, seed=2)
    with defense.in_proportion(0.5):
        by_hand = defense.fit(victim, images[fitted.fold != 0], labels[fitted.fold != 0]).network
    assert same(fitted.networks[0].bounds_state(), by_hand.bounds_state())


def test_the_estimate_counts_every_repeat():
    once, twice = (passes_of(make(repeats=repeats), 24, 4) for repeats in (1, 2))
    assert (twice.forward, twice.backward, twice.at_once) == (2 * once.forward, 2 * once.backward, once.at_once)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 0}, "defense.repeats must be at least 1, got 0"),
        ({"repeats": 2, "offset_rate": 0.1}, "defense.repeats=2 needs defense.offset_rate=null: .* got 0.1"),
    ],
)
def test_wrong_settings_get_one_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
