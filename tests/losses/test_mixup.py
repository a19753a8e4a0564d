"""Mixup: the mixtures and the loss by loops, one share a batch from the right distribution, draws from the generator alone."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from marginclip.errors import UserError
from marginclip.losses import Mixup, mixup
from marginclip.losses.mixup import beta_draw


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=7):
    return torch.rand(count, 2, 4, 4, generator=seeded(9)), torch.arange(count) % 3


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 3))


def test_every_image_is_mixed_with_one_other_by_the_same_share():
    images, labels = batch()
    before = images.clone()
    mixed, others, share = mixup(images, torch.arange(7), alpha=1.0, generator=seeded())
    assert 0 < share < 1
    assert sorted(others.tolist()) == list(range(7))  # the labels are the images' numbers here
    for number, other in enumerate(others.tolist()):
        torch.testing.assert_close(mixed[number], share * before[number] + (1 - share) * before[other])
    assert torch.equal(images, before)
    assert mixup(images, labels, alpha=1.0, generator=seeded(1))[2] != share


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_beta_distributed(alpha):
    generator = seeded()
    draws = [beta_draw(alpha, generator) for _ in range(1000)]
    assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_draws_follow_from_the_generator_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    draws = [mixup(*batch(), alpha=0.5, generator=seeded(3)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    draws.append(mixup(*batch(), alpha=0.5, generator=seeded(3)))
    assert draws[0][2] == draws[1][2] == draws[2][2]
    assert all(torch.equal(draws[0][0], other[0]) and torch.equal(draws[0][1], other[1]) for other in draws[1:])


def test_the_loss_is_that_of_soft_labels():
    model, (images, labels) = linear(), batch()
    found = Mixup(alpha=1.0)(model, images, labels, seeded(5))
    mixed, others, share = mixup(images, labels, alpha=1.0, generator=seeded(5))
    wanted = share * F.one_hot(labels, 3) + (1 - share) * F.one_hot(others, 3)
    by_hand = -(wanted * model(mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found, by_hand)


def test_a_share_of_one_is_the_cross_entropy(monkeypatch):
    monkeypatch.setitem(mixup.__globals__, "beta_draw", lambda *_: 1.0)
    model, (images, labels) = linear(), batch()
    torch.testing.assert_close(Mixup()(model, images, labels, seeded()), F.cross_entropy(model(images), labels))


def test_it_needs_no_other_model():
    model = linear()
    assert Mixup().adapt(model, torch.tensor([5, 1, 1])) is model


@pytest.mark.parametrize("alpha", [0, -1, float("inf"), float("nan")])
def test_alpha_is_positive(alpha):
    with pytest.raises(UserError, match=rf"^loss=mixup: alpha must be positive, got {alpha:g}$"):
        Mixup(alpha=alpha)
