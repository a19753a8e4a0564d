"""Learning rates of whole trainings against slow closed forms; what may be asked for."""

import math

import pytest
import torch

from marginclip.errors import UserError
from marginclip.training import WarmUpAndDrops, cosine_to_zero


def rates_of(schedule, *, total_steps, rate=0.1):
    """The learning rate of every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    stepped = schedule(optimizer, total_steps=total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        stepped.step()
    return rates


def published(epoch):
    """LDAM-DRW's rate of an epoch from 1, of 200."""
    if epoch <= 5:
        return 0.1 * epoch / 5
    return 0.1 * (0.0001 if epoch > 180 else 0.01 if epoch > 160 else 1)


@pytest.mark.parametrize("steps_an_epoch", [1, 3, 97])
def test_the_default_is_the_published_schedule(steps_an_epoch):
    rates = rates_of(WarmUpAndDrops(epochs=200), total_steps=200 * steps_an_epoch)
    assert rates == pytest.approx([published(1 + step // steps_an_epoch) for step in range(200 * steps_an_epoch)])


@pytest.mark.parametrize(("epochs", "drops"), [(1000, (800, 900)), (40, (32, 36)), (10, (8, 9)), (3, (2, 3)), (1, (1, 1))])
def test_shares_are_of_the_epochs(epochs, drops):
    rates = rates_of(WarmUpAndDrops(epochs=epochs, warm_up_epochs=0), total_steps=2 * epochs, rate=1.0)
    first, second = drops
    assert rates == [1.0] * 2 * first + [0.01] * 2 * (second - first) + [0.0001] * 2 * (epochs - second)


def test_milestones_may_be_epochs_whatever_the_length():
    schedule = WarmUpAndDrops(epochs=1000, milestones=[160, 180], factors=[0.1, 0.01])
    assert [schedule.factor(epoch) for epoch in (4, 5, 159, 160, 179, 180, 999)] == [1, 1, 1, 0.1, 0.1, 0.01, 0.01]


def test_without_warm_up_and_drops_the_rate_stays():
    assert set(rates_of(WarmUpAndDrops(epochs=3, warm_up_epochs=0, milestones=[], factors=[]), total_steps=9)) == {0.1}


def test_a_schedule_goes_on_from_its_state():
    schedule, optimizer = WarmUpAndDrops(epochs=10), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    stepped = schedule(optimizer, total_steps=20)
    for _ in range(17):
        optimizer.step()
        stepped.step()
    resumed = schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), total_steps=20)
    resumed.load_state_dict(stepped.state_dict())
    assert resumed.get_last_lr() == stepped.get_last_lr() == [0.01]
    resumed.step()
    assert resumed.get_last_lr() == [0.0001]


def test_the_cosine_falls_from_the_optimizers_rate_to_zero():
    rates = rates_of(cosine_to_zero, total_steps=60, rate=0.002)
    assert rates == pytest.approx([0.001 * (1 + math.cos(math.pi * step / 60)) for step in range(60)], abs=1e-9)
    assert rates[0] == 0.002


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "training.scheduler.epochs must be at least 1, got 0"),
        ({"warm_up_epochs": -1}, "training.scheduler.warm_up_epochs must not be negative, got -1"),
        ({"milestones": [0.9, 0.8]}, "training.scheduler.milestones must be positive and rise, got [0.9, 0.8]"),
        ({"milestones": [0, 5]}, "training.scheduler.milestones must be positive and rise, got [0, 5]"),
        ({"milestones": [0.5, 2.5]}, "training.scheduler.milestones must be shares under 1 or whole epochs, got [0.5, 2.5]"),
        ({"milestones": [5, 10]}, "training.scheduler.milestones must be under the 10 epochs (or shares under 1), got [5, 10]"),
        ({"milestones": "abc"}, "training.scheduler.milestones must be a list of numbers, got 'abc'"),
        ({"milestones": ["a", 0.9]}, "training.scheduler.milestones must be a list of numbers, got ['a', 0.9]"),
        ({"milestones": 0.5}, "training.scheduler.milestones must be a list of numbers, got 0.5"),
        ({"factors": 7}, "training.scheduler.factors must be a list of numbers, got 7"),
        ({"factors": [0.1]}, "training.scheduler.factors must be 2 positive numbers, one a milestone, got [0.1]"),
        ({"factors": [0.1, 0]}, "training.scheduler.factors must be 2 positive numbers, one a milestone, got [0.1, 0]"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings, message):
    with pytest.raises(UserError) as caught:
        WarmUpAndDrops(**({"epochs": 10} | settings))
    assert str(caught.value) == message
