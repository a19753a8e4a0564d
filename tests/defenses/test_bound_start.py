"""Where bounds start: a constant, a share of the clean maxima, or the share that keeps a given part of the model's accuracy."""

import pytest
import torch
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses import MMAC, MMOM, BoundStart, StaticClip
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


@pytest.mark.parametrize(("counts", "part", "few"), [
    ((20, 50), 1.0, False), ((19, 50), 1.0, True), ((10, 25), 0.5, False), ((9, 25), 0.5, True), ((5,), 1.0, True),
])  # fmt: skip
def test_nothing_is_fitted_to_few_images_of_a_class(counts, part, few):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert BoundStart().replaced(labels, part) == (TIGHT if few else BoundStart())
    for start in (BoundStart(kept=0.95), BoundStart(share=0.5), BoundStart(constant=3.0)):
        assert start.replaced(labels, part) is start


def test_few_images_start_where_the_schedule_tight_start_does(victim, draw_quarters):
    clean = draw_quarters(40, seed=1)
    given, fitted = (started(victim, clean, start).bounds_state() for start in (TIGHT, BoundStart()))
    assert all(torch.equal(given[name], value) for name, value in fitted.items())
    assert BoundStart().apply(started(victim, clean, TIGHT), *clean) == 0.4


@pytest.mark.parametrize("images", [40, 8])
def test_a_fold_starts_as_the_whole_does(victim, draw_quarters, images):
    """A fold has half of the images of a class: it is no smaller clean set of its own."""
    clean = draw_quarters(4 * images, seed=2)
    assert (int(clean[1].unique(return_counts=True)[1].min()) >= 20) == (images == 40), "draw others"
    taken = []

    class Watched(BoundStart):
        def replaced(self, labels, part=1.0):
            taken.append(super().replaced(labels, part))
            return taken[-1]

    start = Watched()
    defense = MMAC(steps=1, check_every=1, extra_steps=0, start=start)
    defense.fit(victim, *clean, make_trainer=lambda epochs: silent_trainer(epochs, accelerator="cpu"))
    cross_fitted(defense, victim, *clean, folds=2)
    assert taken == [start if images == 40 else TIGHT] * 3


def test_a_low_quantile_may_keep_less_than_asked_for_even_at_share_one(victim, clean):
    start = BoundStart(kept=1.0, quantile=0.05)
    network = BoundedNetwork(victim, clean[0][:1])
    assert start.apply(network, *clean) == 1.0
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
    share = BoundStart(kept=0.8).apply(network, *clean)
    defense.fit(victim, *clean, make_trainer=lambda epochs: silent_trainer(epochs, accelerator="cpu"))
    assert defense.findings()["start_share"] == share
