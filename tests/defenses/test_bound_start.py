"""Where bounds start: a constant, a share of the clean maxima, or the share that keeps a given part of the model's accuracy."""

import pytest
import torch
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses import MMAC, MMOM, BoundStart, StaticClip
from marginclip.defenses.clipping.feasibility import relax_until_accurate
from marginclip.defenses.clipping.passes import passes_of
from marginclip.defenses.cross_fitting import cross_fitted
from marginclip.errors import UserError
from marginclip.networks.logits import clean_logits
from marginclip.silence import silent_trainer


def kept_at(model, clean, share, quantile=1.0):
    """What bounds at this share of the clean maxima keep of the images that the model has right."""
    images, labels = clean
    network = BoundedNetwork(model, images[:1])
    network.set_from_images(images, share=share, quantile=quantile)
    right = clean_logits(model, images).argmax(1) == labels
    return float((clean_logits(network, images[right]).argmax(1) == labels[right]).float().mean())


def started(model, clean, start):
    network = BoundedNetwork(model, clean[0][:1])
    start.apply(network, *clean)
    return network


def share_of(network, model, clean, quantile=1.0):
    """Which share of the clean maxima the bounds are at: one number for all."""
    widest = BoundedNetwork(model, clean[0][:1])
    widest.set_from_images(clean[0], quantile=quantile)
    pairs = zip(network.bound_parameters(), widest.bound_parameters(), strict=True)
    shares = torch.cat([(value / wide)[wide != 0] for value, wide in pairs])
    torch.testing.assert_close(shares, shares[:1].expand_as(shares))
    return float(shares[0].detach())


@pytest.mark.parametrize("kept", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("quantile", [0.9, 1.0])
def test_fitted_share_is_the_smallest_that_keeps_enough(victim, clean, kept, quantile):
    share = share_of(started(victim, clean, BoundStart(kept=kept, quantile=quantile)), victim, clean, quantile)
    tighter = share - 1 / 256
    assert 0 < share <= 1
    assert kept_at(victim, clean, share, quantile) >= kept or share == 1  # below the maximum even all of it may not be enough
    assert kept_at(victim, clean, tighter, quantile) < kept


def test_more_to_keep_is_a_looser_start(victim, clean):
    shares = [share_of(started(victim, clean, BoundStart(kept=kept)), victim, clean) for kept in (0.3, 0.6, 0.9, 1.0)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_given_share_is_taken_whatever_it_keeps(victim, clean):
    assert share_of(started(victim, clean, BoundStart(share=0.01, kept=1.0)), victim, clean) == pytest.approx(0.01)


def test_only_images_that_the_model_has_right_count(victim, clean):
    images, labels = clean
    wrong = (clean_logits(victim, images).argmax(1) + 1) % 4
    network = started(victim, clean, BoundStart(kept=0.9))
    mislabelled = started(victim, (images.repeat(2, 1, 1, 1), torch.cat([labels, wrong])), BoundStart(kept=0.9))
    assert mislabelled.bounds_state().keys() == network.bounds_state().keys()
    for name, value in network.bounds_state().items():
        torch.testing.assert_close(value, mislabelled.bounds_state()[name])


def test_lower_bounds_move_by_the_same_share(clean):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.LeakyReLU(0.3), nn.Flatten(), nn.LazyLinear(4)).eval()
    with torch.no_grad():
        labels = model(clean[0]).argmax(1)
    network = started(model, (clean[0], labels), BoundStart(kept=0.8))
    assert any(name.endswith("lower") for name in network.bounds_state())
    share_of(network, model, (clean[0], labels))


def test_model_that_is_never_right_needs_a_share(victim, clean):
    images, _ = clean
    wrong = (clean_logits(victim, images).argmax(1) + 1) % 4
    with pytest.raises(UserError, match=r"none of the \d+ clean images correctly.*defense\.start\.share.*labels right\?"):
        started(victim, (images, wrong), BoundStart(kept=0.95))


@pytest.mark.parametrize("setting", [{"kept": 0}, {"kept": 1.5}, {"share": 0}, {"quantile": 0}, {"constant": 0}])
def test_settings_outside_their_range_are_refused(setting):
    (key,) = setting
    with pytest.raises(UserError, match=rf"defense\.start\.{key} must be"):
        BoundStart(**setting)


def test_mmac_starts_where_static_bounds_keep_as_much(victim, clean):
    start = BoundStart(kept=0.95)
    defense = MMAC(steps=1, check_every=1, extra_steps=0, learning_rate=1e-9, keep="last", start=start)
    repaired = defense.fit(victim, *clean, make_trainer=lambda epochs: silent_trainer(epochs, accelerator="cpu")).network
    control = StaticClip(start=start).fit(victim, *clean).network
    for name, value in control.bounds_state().items():
        torch.testing.assert_close(repaired.bounds_state()[name], value, rtol=1e-4, atol=1e-6)
    assert defense.history[0]["agreement"] >= 0.95
    assert defense.findings()["start_share"] == pytest.approx(share_of(control, victim, clean))


TIGHT = BoundStart(share=0.4, quantile=0.9)


@pytest.mark.parametrize(("fewest", "few"), [(50, False), (20, False), (19, True), (5, True), (0, True)])
def test_nothing_is_fitted_to_few_images_of_a_class(fewest, few):
    assert BoundStart().decided(fewest) == (TIGHT if few else BoundStart(kept=0.95))
    for start in (BoundStart(kept=0.9), BoundStart(share=0.5), BoundStart(constant=3.0)):
        assert start.decided(fewest) is start
    assert BoundStart(quantile=0.99).decided(fewest) == BoundStart(quantile=0.99, kept=0.95)  # a given quantile is followed
    decided = BoundStart().decided(fewest)
    assert decided.decided(50 - fewest) == decided


def test_few_images_start_where_the_schedule_tight_start_does(victim, draw_quarters, caplog):
    clean = draw_quarters(40, seed=1)
    given, fitted = (started(victim, clean, start).bounds_state() for start in (TIGHT, BoundStart()))
    assert all(torch.equal(given[name], value) for name, value in fitted.items())
    with caplog.at_level("INFO"):
        assert BoundStart().apply(started(victim, clean, TIGHT), *clean) == TIGHT
    fewest = int(clean[1].bincount().min())
    assert (
        f"the smallest class has {fewest} clean images, fewer than 20: bounds start at 0.4 of the 0.9 quantile" in caplog.text
    )
    found = one_step(victim, clean, BoundStart()).findings()
    assert (found["start_share"], found["start_quantile"]) == (0.4, 0.9)


def test_class_without_clean_images_has_few(victim, draw_quarters):
    images, labels = of_each_class(draw_quarters(160, seed=3), 20)
    assert BoundStart().apply(started(victim, (images, labels), TIGHT), images, labels).kept == 0.95
    for left_out in (0, 3):
        kept = labels != left_out
        assert BoundStart().apply(started(victim, (images, labels), TIGHT), images[kept], labels[kept]) == TIGHT


def one_step(victim, clean, start, **settings):
    defense = MMAC(steps=1, check_every=1, extra_steps=0, start=start, **settings)
    defense.fit(victim, *clean, make_trainer=lambda epochs: silent_trainer(epochs, accelerator="cpu"))
    return defense


def of_each_class(clean, count):
    images, labels = clean
    rows = torch.cat([(labels == label).nonzero().flatten()[:count] for label in range(4)])
    assert torch.equal(labels[rows].bincount(minlength=4), torch.full((4,), count)), "draw more"
    return images[rows], labels[rows]


@pytest.mark.parametrize(("count", "folds"), [(21, 2), (20, 2), (20, 3), (19, 2), (19, 3), (9, 2)])
def test_a_fold_starts_as_the_whole_does(victim, draw_quarters, caplog, monkeypatch, count, folds):
    """It has a part of each class's images, not always the same number: it is no smaller clean set of its own."""
    clean = of_each_class(draw_quarters(240, seed=2), count)
    taken, apply = [], BoundStart.apply

    def noted(start, *given):
        taken.append(apply(start, *given))
        return taken[-1]

    monkeypatch.setattr(BoundStart, "apply", noted)
    defense = one_step(victim, clean, BoundStart())
    caplog.clear()
    with caplog.at_level("INFO"):
        cross_fitted(defense, victim, *clean, folds=folds)
    whole = taken[0]
    assert (whole == TIGHT) == (count < 20)
    assert [(start.quantile, start.kept) for start in taken] == [(whole.quantile, whole.kept)] * (1 + folds)
    assert "smallest class" not in caplog.text  # a fold's start is not the user's
    assert defense.start == BoundStart()


def test_a_low_quantile_may_keep_less_than_asked_for_even_at_share_one(victim, clean):
    start = BoundStart(kept=1.0, quantile=0.05)
    network = BoundedNetwork(victim, clean[0][:1])
    assert start.apply(network, *clean).share == 1.0
    assert kept_at(victim, clean, 1.0, 0.05) < 1.0


def test_passes_of_a_fitted_start_are_counted():
    for repeats in (1, 2):
        fitted, given = (
            passes_of(MMAC(repeats=repeats, start=start), 500, 10) for start in (BoundStart(), BoundStart(share=0.5))
        )
        assert fitted.forward - given.forward == repeats * 9 * 500


def test_every_repeat_starts_at_the_same_share(victim, clean):
    defense = MMAC(steps=1, check_every=1, extra_steps=0, repeats=2)
    defense.fit(victim, *clean, make_trainer=lambda epochs: silent_trainer(epochs, accelerator="cpu"))
    found = defense.findings()
    assert found["start_share"] == found["other_repeats"][0]["start_share"]


def test_with_offsets_the_last_activation_alone_is_fitted(victim, clean):
    defense = MMOM(steps=1, tolerance=None, start=BoundStart(kept=0.8))
    network = BoundedNetwork(victim, clean[0][:1], sites="last")
    share = BoundStart(kept=0.8).apply(network, *clean).share
    defense.fit(victim, *clean, make_trainer=lambda epochs: silent_trainer(epochs, accelerator="cpu"))
    assert defense.findings()["start_share"] == share


class FromBound(nn.Module):
    """An image of value v is right where its activation is not cut below v: bounds of share s keep those of v <= s."""

    def forward(self, images):
        value = images.flatten(1).amax(1, keepdim=True)
        kept = torch.relu(images).flatten(1).amax(1, keepdim=True)
        return torch.cat([kept - value + 1e-4, torch.zeros_like(value)], 1)


def test_exactly_what_is_to_be_kept_is_enough():
    """95 of 100 are 0.94999999 in float32."""
    images = torch.full((100, 1, 1, 1), 0.25)
    images[95:] = 1.0
    labels = torch.zeros(100, dtype=torch.long)
    network = BoundedNetwork(FromBound().eval(), images[:1])
    found = BoundStart(kept=0.95).apply(network, images, labels)
    assert float((clean_logits(network, images).argmax(1) == labels).double().mean()) == 0.95
    assert found.share == pytest.approx(0.25, abs=1 / 256)
    assert relax_until_accurate(network, images, labels, 0.95) == 0
