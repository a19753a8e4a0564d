"""Sharpness-aware fine-tuning: the worst move against a search, one step against plain arithmetic, and flatness."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from marginclip.defenses import FTSAM, FineTune
from marginclip.defenses.weights.ft_sam import worst_move
from marginclip.errors import UserError

SHORT = {"epochs": 2, "batch_size": 12}


def test_the_worst_move_beats_random_ones_of_its_length():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
    slopes = [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
    moves = worst_move(parameters, slopes, 0.7)

    def length(moved):
        return math.sqrt(sum(float((move / theta.abs()).square().sum()) for move, theta in zip(moved, parameters, strict=True)))

    def rise(moved):
        return sum(float((move * slope).sum()) for move, slope in zip(moved, slopes, strict=True))

    assert length(moves) == pytest.approx(0.7, rel=1e-5)
    for _ in range(200):
        other = [torch.randn(theta.shape, generator=generator) * theta.abs() for theta in parameters]
        other = [0.7 / length(other) * move for move in other]
        assert rise(other) < rise(moves)


def test_parameters_that_do_not_matter_do_not_move():
    parameters = [torch.ones(2), torch.ones(3)]
    moves = worst_move(parameters, [torch.tensor([1.0, 0.0]), None], 1.0)
    torch.testing.assert_close(moves, [torch.tensor([1.0, 0.0]), torch.zeros(3)])
    assert all(float(move.abs().sum()) == 0 for move in worst_move(parameters, [None, torch.zeros(3)], 1.0))


def test_one_step_is_the_gradient_at_the_worst_point(plain_victim, clean, fit):
    rho, rate = 0.5, 0.1
    stepped = fit(FTSAM(rho=rho, epochs=1, batch_size=24, learning_rate=rate, weight_decay=0.0), plain_victim, clean)
    network = copy.deepcopy(plain_victim)

    def gradients():
        loss = F.cross_entropy(network(clean[0]), clean[1], label_smoothing=0.1)
        return torch.autograd.grad(loss, list(network.parameters()))

    start = [parameter.detach().clone() for parameter in network.parameters()]
    first = gradients()
    length = math.sqrt(sum(float((theta * slope).square().sum()) for theta, slope in zip(start, first, strict=True)))
    with torch.no_grad():
        for parameter, slope in zip(network.parameters(), first, strict=True):
            parameter += rho * parameter**2 * slope / length
    worst = gradients()
    for theta, slope, found in zip(start, worst, stepped.parameters(), strict=True):
        torch.testing.assert_close(found, theta - rate * slope, rtol=1e-4, atol=1e-6)


def test_without_a_ball_it_is_fine_tuning(victim, clean, fit):
    class Falling(FineTune):
        def rate(self, epoch):
            return (0.01, 0.005)[epoch]

    sam = fit(FTSAM(rho=0.0, label_smoothing=0.0, **SHORT), victim, clean).state_dict()
    plain = fit(Falling(**SHORT), victim, clean).state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(sam[name], value)


def test_statistics_follow_the_first_pass_alone(victim, clean, fit):
    """The worst point's activations would move them, too."""
    network = fit(FTSAM(rho=5.0, epochs=1, batch_size=24), victim, clean)
    norm = victim[1]
    mean = victim[0](clean[0]).mean((0, 2, 3))
    torch.testing.assert_close(network[1].running_mean, 0.9 * norm.running_mean + 0.1 * mean)
    assert network[1].num_batches_tracked == norm.num_batches_tracked + 1


def test_the_rate_falls_along_a_cosine():
    defense = FTSAM(epochs=4, learning_rate=0.01)
    assert [defense.rate(epoch) for epoch in range(5)] == pytest.approx([0.01, 0.0085355, 0.005, 0.0014645, 0.0], abs=1e-6)


@pytest.mark.parametrize("at", [3])
def test_interrupted_is_bit_for_bit_the_uninterrupted(victim, clean, at, fit, interrupted_and_resumed):
    straight = fit(FTSAM(**SHORT, seed=1), victim, clean)
    resumed, _ = interrupted_and_resumed(lambda: FTSAM(**SHORT, seed=1), victim, clean, at=at)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())


@pytest.mark.parametrize(("settings", "key"), [({"rho": -1.0}, "rho"), ({"label_smoothing": 1.0}, "label_smoothing")])
def test_settings_that_make_no_sense_name_their_key(settings, key):
    with pytest.raises(UserError, match=f"defense.{key} must"):
        FTSAM(**settings)
