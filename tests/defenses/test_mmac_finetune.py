"""MMAC and fine-tuning: what is trained and what is not, each step against plain autograd, and going on after an interruption."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from marginclip.clipping import BoundedNetwork
from marginclip.defenses import MMAC, AscentPlan, MMACFineTune
from marginclip.errors import UserError
from marginclip.maxmargin.margin import ascend_margins

SHORT = partial(MMAC, steps=4, extra_steps=0, check_every=2, ascent=AscentPlan(starts_per_class=2, steps=1, first_steps=1))


def make(**settings):
    return MMACFineTune(
        **({"mmac": SHORT, "epochs": 2, "batch_size": 12, "ascent": AscentPlan(starts_per_class=2, refresh_every=1)} | settings)
    )


def test_bounds_stay_as_mmac_learned_them_and_every_weight_moves(victim, clean, fit):
    defense = make(seed=3)
    repaired = fit(defense, victim, clean)
    alone = fit(SHORT(seed=3), victim, clean)
    assert isinstance(repaired, BoundedNetwork)
    for name, value in alone.bounds_state().items():
        assert torch.equal(repaired.bounds_state()[name], value)
    before, after = alone.network.state_dict(), repaired.network.state_dict()
    for name, value in before.items():
        if name.startswith("bound_") or "running" in name or "num_batches" in name:
            assert torch.equal(after[name], value), name  # batch norms keep the model's statistics
        else:
            assert not torch.equal(after[name], value), name


def test_the_row_before_the_fine_tuning_is_mmac(victim, clean):
    result = make(seed=1).fit(victim, *clean)
    assert list(result.variants) == ["mmac"]
    images, _ = clean
    torch.testing.assert_close(result.variants["mmac"].network(images), SHORT(seed=1).fit(victim, *clean).network(images))
    assert set(result.findings["mmac"]) == {"bound_steps", "stopped_by", "relaxed", "start_share", "start_quantile"}
    bare = make(mmac=None).fit(victim, *clean)
    assert bare.variants == {}
    assert not isinstance(bare.network, BoundedNetwork)


def test_statistics_stay_where_the_model_is_in_training_mode(victim, clean, fit):
    """The network is never bounded here, so that its mode is the model's."""
    wanted = fit(make(mmac=None, seed=1), victim.eval(), clean).state_dict()
    found = fit(make(mmac=None, seed=1), victim.train(), clean).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_a_step_is_adam_on_clean_images_and_on_margin_inputs_with_their_own_labels(plain_victim, clean, fit):
    images, labels = clean
    defense = make(
        mmac=None, epochs=1, batch_size=24, margin_weight=0.5, mixture_weight=0.0, weight_decay=0.0, learning_rate=0.01, seed=4
    )
    repaired = fit(defense, plain_victim, clean)
    slow = copy.deepcopy(plain_victim)
    wanted = torch.arange(4).repeat_interleave(2)
    rows = defense.ascent.start_rows(labels, wanted, torch.Generator().manual_seed(defense._draw(0, 1)))
    assert bool((labels[rows] != wanted).all())
    moved = ascend_margins(slow, wanted, images[rows], steps=4, step_size=0.005, rule="unit_rms").images
    loss = F.cross_entropy(slow(images), labels) + 0.5 * F.cross_entropy(slow(moved), labels[rows])
    parameters = list(slow.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        step = 0.01 * gradient / (gradient.abs() + 1e-8)  # Adam's first step
        torch.testing.assert_close(
            dict(repaired.named_parameters())[next(name for name, value in slow.named_parameters() if value is parameter)],
            (parameter - step).detach(),
            atol=1e-4, rtol=1e-3,
        )  # fmt: skip


def test_mixtures_hold_the_network_to_what_it_was(plain_victim, clean):
    images, labels = clean
    defense = make(mmac=None, batch_size=24, margin_weight=0.0, mixture_weight=2.0)
    defense.prepare(plain_victim, images, labels)
    with torch.no_grad():  # a network that is not the one before
        for parameter in defense.network.parameters():
            parameter.mul_(1.1)
    inputs, answers = defense.augmented(images, labels, torch.Generator().manual_seed(9))
    assert torch.equal(answers, labels)
    loss = float(defense.loss(inputs, answers).detach())
    generator = torch.Generator().manual_seed(9)
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    mixed = share * images + (1 - share) * images[torch.randperm(len(images), generator=generator)]
    torch.testing.assert_close(inputs[len(images) :], mixed)
    with torch.no_grad():
        before, now = plain_victim(mixed).softmax(1), defense.network(mixed).softmax(1)
        expected = F.cross_entropy(defense.network(images), labels) + 2 * (before * (before / now).log()).sum(1).mean()
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_the_network_before_is_the_bounded_one_and_stays(victim, clean):
    images, labels = clean
    defense = make(seed=2)
    result = defense.fit(victim, images, labels)
    before = result.variants["mmac"].network
    assert torch.equal(defense.before[0](images), before(images))
    assert not torch.equal(result.network(images), before(images))


def test_margins_fall_where_fine_tuning_alone_leaves_them(victim, clean, draw_quarters, fit):
    images, labels = draw_quarters(40, 5)

    def largest(network):
        """The mean margin that a longer search finds from images that no repair saw."""
        wanted = (labels + 1) % 4
        found = ascend_margins(network, wanted, images, steps=10, step_size=0.02, rule="unit_rms")
        return float(found.margins.mean())

    plan = AscentPlan(starts_per_class=6, first_steps=10, steps=10, step_size=0.02, refresh_every=1)
    settings = {"mmac": None, "epochs": 30, "learning_rate": 0.003, "ascent": plan}
    with_margins, without = (fit(make(margin_weight=weight, **settings), victim, clean) for weight in (1.0, 0.0))
    assert largest(with_margins) < largest(without) - 1
    assert float((with_margins(images).argmax(1) == labels).float().mean()) > 0.8


@pytest.mark.parametrize("at", [2, 3])
def test_interrupted_is_bit_for_bit_the_uninterrupted(victim, clean, at, fit, interrupted_and_resumed):
    straight = fit(through := make(seed=3), victim, clean)
    resumed, again = interrupted_and_resumed(lambda: make(seed=3), victim, clean, at=at)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    assert again.history == through.history


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin_weight": -1}, "defense.margin_weight must not be negative, got -1"),
        ({"mixture_weight": -2}, "defense.mixture_weight must not be negative, got -2"),
        ({"ascent": AscentPlan(start_from="noise")}, "defense.ascent.start_from must be clean: .* got noise"),
        ({"mmac": partial(MMAC, steps=0)}, "defense.mmac.steps must be at least 1, got 0"),
        ({"epochs": 0}, "defense.epochs"),
    ],
)
def test_settings_that_make_no_sense_name_their_key(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        (AscentPlan(), r"defense\.ascent\.refresh_every must be 1: .*; got 2"),
        (AscentPlan(refresh_every=1, warm_start=True), r"defense\.ascent\.warm_start must be false"),
        (AscentPlan(refresh_every=1, network="original"), r"defense\.ascent\.network must be bounded"),
        (AscentPlan(refresh_every=1, batch_size=3), r"defense\.ascent\.batch_size must be null"),
        (AscentPlan(refresh_every=1, start_from="noise"), r"defense\.ascent\.start_from must be clean"),
    ],
)
def test_a_plan_that_it_cannot_follow_is_refused(plan, wanted):
    with pytest.raises(UserError, match=wanted):
        make(ascent=plan)


def test_a_fold_learns_its_bounds_in_proportion():
    defense = make(mmac=partial(SHORT, batch_size=30))
    with defense.in_proportion(0.5):
        assert (defense.bound_learning.batch_size, defense.bound_learning.ascent.starts_per_class) == (15, 1)
    assert (defense.bound_learning.batch_size, defense.bound_learning.ascent.starts_per_class) == (30, 2)
    with make(mmac=None).in_proportion(0.5):
        pass
