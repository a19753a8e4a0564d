"""Training through the defender's bounds: the penalty by loops, the step by hand, when bounds and weights change hands."""

import copy
from functools import partial
from itertools import pairwise

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from marginclip.attacks import Adaptive, AllToOne, BadNet
from marginclip.clipping import BoundedNetwork
from marginclip.errors import UserError
from marginclip.training import AdaptiveTraining
from marginclip.training.adaptive import noted_excess

SHAPE = (3, 8, 8)


def batch(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, *SHAPE, generator=generator)
    return {"images": images, "labels": torch.arange(count) % 4, "triggered": torch.arange(count) >= count - 3}


class Attacker(Adaptive):
    """Bounds that are a constant, and a note of when they were asked for, and for which model."""

    bound = 0.5

    def learn_bounds(self, model):
        self.asked = [*getattr(self, "asked", []), copy.deepcopy(model.state_dict())]
        bounded = BoundedNetwork(model, torch.zeros(1, *SHAPE))
        bounded.set_constant(self.bound)
        return bounded.bounds_state()


def attacker(**settings):
    base = partial(BadNet, patch_size=1, margin=1)
    return Attacker(AllToOne(4, target=0), SHAPE, base=base, defender=None, **settings)


def fit(module, batches):
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    plan = module.attack.training_plan(99)
    L.Trainer(accelerator="cpu", **silent, **plan).fit(module, DataLoader(batches, batch_size=None))
    return module


def excess_of(bounded, images, chosen):
    with noted_excess(bounded, chosen) as excess:
        bounded(images)
    return excess


def test_the_excess_by_loops(net):
    bounded, one = BoundedNetwork(net, torch.zeros(1, *SHAPE)), batch()
    bounded.set_constant(0.2)
    found = excess_of(bounded, one["images"], one["triggered"])
    # Through the bounds: what the second call sees was cut by the first.
    first = F.relu(net[1](net[0](one["images"])))
    second = F.relu(net[3](first.clamp(max=0.2)))
    for excess, values in zip(found, (first, second), strict=True):
        over = [max(0.0, value - 0.2) for value in values[5:].flatten().tolist()]
        assert excess.item() == pytest.approx(sum(over) / len(over), rel=1e-4)
        assert excess > 0
    assert len(excess_of(bounded, one["images"], one["triggered"])) == 2  # nothing is left of the pass before


def test_without_bounds_there_is_no_excess(net):
    bounded, one = BoundedNetwork(net, torch.zeros(1, *SHAPE)), batch()
    assert [value.item() for value in excess_of(bounded, one["images"], one["triggered"])] == [0, 0]


def test_the_penalty_moves_only_units_over_their_bound(net):
    bounded, one = BoundedNetwork(net, torch.zeros(1, *SHAPE)), batch()
    values = F.relu(net[1](net[0](one["images"]))).detach()
    highest = values[one["triggered"]].amax((0, 2, 3))
    (_, first), *_ = bounded.each()
    low = torch.tensor([True, False, True, False, False])
    first.upper.data = torch.where(low, highest / 2, highest * 1.01)
    for parameter in bounded.network.parameters():
        parameter.requires_grad_(True)
    excess = excess_of(bounded, one["images"], one["triggered"])
    weight = dict(bounded.network.named_parameters())["0.weight"]
    (gradient,) = torch.autograd.grad(excess[0], weight)
    assert (gradient.flatten(1).abs().sum(1) > 0).tolist() == (low & (highest > 0)).tolist()
    assert (low & (highest > 0)).any()


@pytest.mark.parametrize("unbounded_weight", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 5.0])
@pytest.mark.parametrize("bound", [0.2, float("inf")])
def test_a_step_is_sgd_on_the_bounded_network_with_beta_times_the_excess(net, beta, bound, unbounded_weight):
    """And on the network without bounds, as far as it has a weight."""
    one = batch()
    by_hand = copy.deepcopy(net).train()
    attack = attacker(beta=beta, unbounded_weight=unbounded_weight, rounds=1, epochs_per_round=1, learning_rate=0.1)
    attack.bound = bound
    fit(AdaptiveTraining(net, attack=attack, optimizer=None), [one])

    first = F.relu(by_hand[1](by_hand[0](one["images"])))
    second = F.relu(by_hand[3](first.clamp(max=bound)))
    logits = by_hand[7](by_hand[6](by_hand[5](second.clamp(max=bound))))
    penalty = sum(F.relu(values[one["triggered"]] - bound).mean() for values in (first, second)) / 2
    assert bool(penalty > 0) is (bound < 1)
    loss = F.cross_entropy(logits, one["labels"]) + beta * penalty
    if unbounded_weight:
        loss = loss + unbounded_weight * F.cross_entropy(by_hand(one["images"]), one["labels"])
    values = list(by_hand.parameters())
    for value, gradient in zip(values, torch.autograd.grad(loss, values), strict=True):
        value.data -= 0.1 * (gradient + 5e-4 * value)
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_bounds_are_learned_once_a_round_for_the_weights_trained_so_far(net):
    before = copy.deepcopy(net.state_dict())
    attack = attacker(rounds=3, epochs_per_round=2)
    module = AdaptiveTraining(net, attack=attack, optimizer=None)
    trained = []

    class Note(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            trained.append(copy.deepcopy(module.model.state_dict()))

        def on_train_batch_end(self, trainer, module, *_):
            assert all((value.upper == 0.5).all() for _, value in module.bounded.each())

    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    runner = L.Trainer(accelerator="cpu", callbacks=[Note()], **silent, **attack.training_plan(1))
    runner.fit(module, DataLoader([batch(seed=1), batch(seed=2)], batch_size=None))
    assert len(attack.asked) == 3
    assert equal(attack.asked[0], before)
    for asked, state in zip(attack.asked, trained[::2], strict=True):
        assert equal(asked, state)
    # After every epoch the model has the weights and the statistics of the bounded copy.
    assert not any(equal(one, other) for one, other in pairwise(trained))
    assert equal(net.state_dict(), {name: module.bounded.network.state_dict()[name] for name in net.state_dict()})


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_weights_that_the_bounded_network_has_not_are_refused():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(192, 4), nn.Linear(2, 2)

        def forward(self, images):
            return F.relu(self.used(images.flatten(1)))

    module = AdaptiveTraining(Spare(), attack=attacker(rounds=1), optimizer=None)
    with pytest.raises(UserError, match=r"cannot train this model through its bounds: 'spare\.weight' is not used"):
        fit(module, [batch()])
