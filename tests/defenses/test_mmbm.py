"""MMBM: the same bound learning with another objective, checked against closed forms."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses import AscentPlan, BoundLearning
from marginclip.defenses.clipping.settings import BoundStart
from marginclip.errors import UserError
from marginclip.experiment.command import plain
from marginclip.experiment.spec import run_spec
from marginclip.experiment.stages import make_methods
from marginclip.maxmargin import MMBMObjective, mmbm
from marginclip.maxmargin.lambda_control import LambdaController
from marginclip.models import ResNet


def make_defense(config):
    """The defense of a composed configuration."""
    return make_methods(run_spec(plain(config))).defense


CONF = Path(__file__).parents[2] / "conf"


def learning(**settings):
    lambda_ = LambdaController(
        **(
            {"initial": 0.5, "control": "fixed", "factor": 1.2, "min_agreement": 0.95, "first_check": 1}
            | settings.pop("lambda_", {})
        )
    )
    stated = {"sites": "all", "start": BoundStart(constant=8.0), "steps": 4, "check_every": 2, "batch_size": 100}
    stated |= {"learning_rate": 0.1, "lr_scale": "absolute", "keep": "last", "project": False}
    return BoundLearning(objective=MMBMObjective(), lambda_=lambda_, **(stated | settings))


def test_objective_equals_loops():
    generator = torch.Generator().manual_seed(0)
    bounded, clean = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    bounds = [torch.randn(4, generator=generator), torch.randn(7, generator=generator)]
    terms = mmbm(bounded, clean, bounds, 0.7)
    pairs = zip(bounded.flatten().tolist(), clean.flatten().tolist(), strict=True)
    data = sum((one - other) ** 2 for one, other in pairs) / 15
    lengths = sum(sum(value**2 for value in bound.tolist()) ** 0.5 for bound in bounds)
    assert float(terms.data) == pytest.approx(data, rel=1e-5)
    assert float(terms.margin) == pytest.approx(lengths, rel=1e-5)
    assert float(terms.loss) == pytest.approx(data + 0.7 * lengths, rel=1e-5)


def test_without_penalty_bounds_above_the_activations_stay_where_they_are(victim, clean, fit):
    repaired = fit(learning(start=BoundStart(constant=1000.0), lambda_={"initial": 0.0}), victim, clean)
    assert all(torch.equal(value, torch.full_like(value, 1000.0)) for value in repaired.bounds_state().values())


def test_above_the_activations_only_the_penalty_moves_them(plain_victim, clean, fit):
    """Adam's first step is the gradient over its size: every bound shrinks by the learning rate, whatever its length."""
    repaired = fit(learning(start=BoundStart(constant=1000.0), steps=1, check_every=1), plain_victim, clean)
    for value in repaired.bounds_state().values():
        torch.testing.assert_close(value, torch.full_like(value, 999.9))


def test_one_step_is_adams_first_on_the_closed_gradient(plain_victim, clean, fit):
    start = BoundStart(share=0.6, quantile=1.0)
    repaired = fit(learning(start=start, steps=1, check_every=1, lambda_={"initial": 0.05}), plain_victim, clean)
    network = BoundedNetwork(plain_victim, clean[0][:1])
    start.apply(network, *clean)
    with torch.no_grad():
        targets = plain_victim(clean[0])
    right = targets.argmax(1) == clean[1]
    data = F.mse_loss(network(clean[0][right]), targets[right])
    gradients = torch.autograd.grad(data, network.bound_parameters())
    for value, old, gradient in zip(repaired.bound_parameters(), network.bound_parameters(), gradients, strict=True):
        whole = gradient + 0.05 * old.detach() / old.detach().norm()
        clear = whole.abs() > 1e-5
        assert clear.any()
        torch.testing.assert_close(value[clear], (old - 0.1 * whole.sign())[clear].detach(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("blocks", "places"), [((2, 2, 2, 2), [0, 4, 8]), ((1, 1, 1), [0, 2, 4])])
def test_first_half_is_the_stem_and_the_first_stages(blocks, places):
    model = ResNet(10, 3, blocks=blocks, width=64).eval()
    images = torch.rand(1, 3, 16, 16)
    every = [name for name, _ in BoundedNetwork(model, images).each()]
    half = BoundedNetwork(model, images, sites="first_half")
    assert [name[4:] for name, _ in half.each()] == [every[place][4:] for place in places]
    assert half.num_bounds == 64 + 64 + 128
    assert torch.equal(half(images), model(images))


def test_sites_by_name_and_what_they_leave_alone(plain_victim, clean, fit):
    every = [name for name, _ in BoundedNetwork(plain_victim, clean[0][:1]).each()]
    repaired = fit(learning(sites=[every[1]], start=BoundStart(constant=0.1), steps=1), plain_victim, clean)
    assert [name for name, _ in repaired.each()] == [every[1]]
    with torch.no_grad():
        second = plain_victim[:6](clean[0])
        bound = next(iter(repaired.bounds_state().values()))
        torch.testing.assert_close(repaired(clean[0]), plain_victim[6:](torch.minimum(second, bound.view(1, -1, 1, 1))))
    with pytest.raises(UserError, match=r"defense\.sites .*'third'; this model has 000_"):
        fit(learning(sites=["third"]), plain_victim, clean)


def test_network_without_feature_maps_is_bounded_in_its_first_half(clean):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    assert BoundedNetwork(model, clean[0], sites="first_half").num_bounds == 8


def preset():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return make_defense(compose("defend", overrides=["defense=mmbm"]))


def test_lambda_moves_after_20_30_and_40_of_50_passes(victim, clean, fit, monkeypatch):
    defense = preset()
    seen = []

    def still(batch, batch_idx):
        seen.append(defense.lambda_.value)
        return 0 * defense.bounded.bound_parameters()[0].sum()

    monkeypatch.setattr(defense, "training_step", still)
    fit(defense, victim, clean)
    by_pass = seen[::3]  # 500 images in batches of 200
    assert len(seen) == 150
    assert [number for number in range(1, 50) if by_pass[number] != by_pass[number - 1]] == [20, 30, 40]
    assert by_pass[0] == 0.1 and by_pass[-1] == pytest.approx(0.1 * 1.2**3)


def test_no_margins_are_ascended(victim, clean, fit):
    defense = learning()
    fit(defense, victim, clean)
    assert len(defense.margin_inputs) == 0
    assert all("max_margin" not in entry for entry in defense.history)
    with pytest.raises(UserError, match=r"defense\.ascent has no effect"):
        learning(ascent=AscentPlan())


@pytest.mark.parametrize("at", [3, 5])
def test_interrupted_is_bit_for_bit_the_uninterrupted(victim, clean, at, fit, interrupted_and_resumed):
    def make():
        return learning(steps=6, batch_size=7, lambda_={"control": "agreement"}, start=BoundStart(constant=1.0))

    straight = fit(make(), victim, clean)
    resumed, _ = interrupted_and_resumed(make, victim, clean, at=at)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
