"""A tolerance in points of accuracy, held on images that a repair has not seen; against a loop that relaxes and counts by hand."""

import logging
import re

import pytest
import torch

import marginclip
from marginclip.clipping import activation_extremes
from marginclip.defenses import MMAC, MMOM, AscentPlan, Auto, BoundStart, FineTune, MMACFineTune, StaticClip
from marginclip.defenses.clipping.tolerance import Cost, hold, keeps_bounds
from marginclip.defenses.cross_fitting import cross_fitted, stratified_folds
from marginclip.errors import UserError
from marginclip.networks.logits import clean_logits

TIGHT = BoundStart(share=0.05, quantile=1.0)


@pytest.fixture
def given(victim, clean):
    """A tight repair of the victim, two more of half of the images each, and what :func:`hold` takes beside them."""
    images, labels = clean
    defense = StaticClip(start=TIGHT)
    return (
        defense.fit(victim, images, labels).network, cross_fitted(defense, victim, images, labels), images, labels,
        clean_logits(victim, images),
    )  # fmt: skip


def bounds_at(network, images, share):
    """The bounds ``share`` of the way from 0.05 of each clean maximum to the maximum, counted map by map."""
    wanted = {}
    for name, (_, highest) in activation_extremes(network, images).items():
        most = highest.amax(0)
        wanted[f"{name}.upper"] = TIGHT.share * most + share * (most - TIGHT.share * most)
    return wanted


def slow_points(victim, images, labels, share):
    """Points lost out of fold, image by image, at a share of the way."""
    fold = stratified_folds(labels, 2, 0)
    lost = 0
    for number in range(2):
        inside = images[fold != number]
        network = StaticClip(start=TIGHT).fit(victim, inside, labels[fold != number]).network
        network.load_bounds(bounds_at(network, inside, share))
        for image, label in zip(images[fold == number], labels[fold == number], strict=True):
            before, after = victim(image[None]).argmax(1), network(image[None]).argmax(1)
            lost += int(before == label) - int(after == label)
    return 100 * lost / len(images)


@pytest.mark.parametrize("tolerance", [0.0, 10.0])
def test_the_first_share_that_holds_is_taken(given, victim, tolerance):
    network, fitted, images, labels, logits = given
    shares = [*(step / 50 for step in range(10)), *(tenth / 10 for tenth in range(2, 11))]
    points = [slow_points(victim, images, labels, share) for share in shares]
    wanted = next(share for share, lost in zip(shares, points, strict=True) if lost <= tolerance)
    assert 0 < wanted < 1
    cost = hold(network, fitted, images, labels, logits, tolerance=tolerance)
    assert cost.relaxed == wanted
    assert cost.points == pytest.approx(points[shares.index(wanted)])
    for name, value in bounds_at(network, images, wanted).items():
        torch.testing.assert_close(network.bounds_state()[name], value)


@pytest.mark.parametrize("settings", [{"tolerance": None}, {"tolerance": 100.0}, {"tolerance": 0.0, "keep_bounds": True}])
def test_bounds_stay_as_learned_where_they_may(given, settings):
    network, *rest = given
    before = network.bounds_state()
    cost = hold(network, *rest, **settings)
    assert cost.relaxed == 0
    assert cost.points > 10
    assert all(torch.equal(value, before[name]) for name, value in network.bounds_state().items())


def test_what_cannot_be_held_leaves_the_learned_bounds(given):
    network, fitted, images, labels, logits = given
    for other in fitted.networks:
        with torch.no_grad():
            next(iter(other.network.parameters())).zero_()  # no bounds make up for this
    before = [each.bounds_state() for each in (network, *fitted.networks)]
    cost = hold(network, fitted, images, labels, logits, tolerance=1.0)
    assert cost.points > 1
    assert cost.relaxed == 0
    for each, bounds in zip((network, *fitted.networks), before, strict=True):
        assert all(torch.equal(value, bounds[name]) for name, value in each.bounds_state().items())


def test_repair_holds_it_and_says_so(victim, clean, caplog):
    defense = StaticClip(start=TIGHT)
    with caplog.at_level(logging.WARNING):
        tight = marginclip.repair(victim, *clean, defense=defense, tolerance=None)
        assert caplog.records == []
        held = marginclip.repair(victim, *clean, defense=defense, tolerance=1.0)
    assert "the bounds were relaxed by" in caplog.text
    assert all(bool((one.upper >= other.upper).all()) for (_, one), (_, other) in zip(held.each(), tight.each(), strict=True))


def test_published_schedules_keep_their_bounds(victim, clean):
    plan = AscentPlan(starts_per_class=1, steps=1, first_steps=1)
    exact = MMAC(steps=2, check_every=1, keep="last", start=TIGHT, ascent=plan)
    assert keeps_bounds(exact)
    assert not keeps_bounds(MMAC())
    one, other = (marginclip.repair(victim, *clean, defense=exact, tolerance=tolerance) for tolerance in (None, "auto"))
    assert all(torch.equal(value, other.bounds_state()[name]) for name, value in one.bounds_state().items())


@pytest.mark.parametrize("defense", [MMAC(keep="last"), MMOM(), Auto(), FineTune()])
def test_a_tolerance_that_a_method_does_not_hold_is_refused(victim, clean, defense, monkeypatch):
    monkeypatch.setattr(type(defense), "fit", lambda *_, **__: pytest.fail("a repair was made"))
    message = f"{defense.label} does not relax bounds, so that tolerance=0.5 has no effect: leave it out"
    with pytest.raises(UserError, match=re.escape(message)):
        marginclip.repair(victim, *clean, defense=defense, tolerance=0.5)


def test_a_result_without_bounds_holds_no_tolerance_and_a_warning_says_so(victim, clean, caplog):
    defense = MMACFineTune(mmac=None, epochs=1, ascent=AscentPlan(starts_per_class=1, steps=1, first_steps=1, refresh_every=1))
    with caplog.at_level(logging.WARNING):
        marginclip.repair(victim, *clean, defense=defense)
        assert caplog.records == []
        marginclip.repair(victim, *clean, defense=defense, tolerance=0.5)
    assert "MMAC + fine-tuning set no bounds: nothing holds its cost to tolerance=0.5" in caplog.text


@pytest.mark.parametrize("tolerance", [-1, "1", True])
def test_a_tolerance_is_a_number_of_points(victim, clean, tolerance):
    with pytest.raises(UserError, match="tolerance must be points of accuracy from 0 up, or null, got"):
        marginclip.repair(victim, *clean, tolerance=tolerance)


def test_an_artefact_of_a_method_without_bounds_is_refused_before_it_is_fitted(victim, clean):
    class Never(FineTune):
        def fit(self, *_, **__):
            raise AssertionError("it was fitted")

    with pytest.raises(UserError, match="fine-tuning does not bound activations"):
        marginclip.Artefact.fit(victim, *clean, defense=Never())


def test_one_image_of_a_hundred_is_one_point():
    """0.97 less 0.96 is more than 0.01 in binary; a cost of exactly the tolerance holds it."""
    for size in (100, 200, 500, 1000):
        for right in range(size // 100, size + 1):
            assert Cost(right / size, (right - size // 100) / size, 0.0, torch.zeros(1, 2)).points == 1.0
