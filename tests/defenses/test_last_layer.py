"""Training the last layer alone: each step against plain autograd through the whole network, restarts, and resuming."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.defenses import LastLayer
from marginclip.errors import UserError


def slow(model, clean, defense):
    """Gradients of the last layer of the whole network in evaluation mode; a velocity, weight decay, and a cosine rate."""
    images, labels = clean
    network = copy.deepcopy(model).eval()
    parameters = [network[9].weight, network[9].bias]
    velocity = [torch.zeros_like(value) for value in parameters]
    for epoch in range(defense.epochs):
        rate = defense.learning_rate * 0.5 * (1 + math.cos(epoch / defense.epochs * math.pi))
        for index in range(defense.steps_per_epoch):
            rows = defense._rows(epoch, index)
            gradients = torch.autograd.grad(F.cross_entropy(network(images[rows]), labels[rows]), parameters)
            with torch.no_grad():
                for value, gradient, speed in zip(parameters, gradients, velocity, strict=True):
                    speed.mul_(defense.momentum).add_(gradient + defense.weight_decay * value)
                    value -= rate * speed
    return network


def test_is_textbook_sgd_on_the_last_layer(victim, clean, fit):
    defense = LastLayer(epochs=4, batch_size=10, learning_rate=0.1, weight_decay=0.05, seed=2)
    repaired = fit(defense, victim, clean)
    wanted = slow(victim, clean, defense)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(repaired.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(repaired[9].weight, victim[9].weight, atol=1e-2)
    assert len(defense.history) == 4
    assert defense.history[-1]["loss"] < defense.history[0]["loss"]


def test_nothing_but_the_last_layer_changes(victim, clean, fit):
    repaired = fit(LastLayer(epochs=2), victim, clean)
    assert repaired.state_dict().keys() == victim.state_dict().keys()
    for name, value in victim.state_dict().items():
        assert torch.equal(repaired.state_dict()[name], value) is not name.startswith("9."), name


def test_misclassified_images_are_learned_from(victim, clean, fit):
    images, labels = clean
    wrong = victim(images).argmax(1) != labels
    labels = labels.clone()
    labels[:6] = (labels[:6] + 1) % 4
    defense = LastLayer(epochs=1)
    fit(defense, victim, (images, labels))
    assert torch.equal(defense.labels, labels)
    assert len(defense.images) == 24
    assert int(wrong.sum()) < 6


def test_a_restarted_layer_forgets_the_old_one_and_follows_from_the_seed(victim, clean, fit):
    other = copy.deepcopy(victim)
    with torch.no_grad():
        other[9].weight.mul_(-3)
    state = torch.get_rng_state()
    defenses = [LastLayer(restart=True, epochs=2, seed=seed) for seed in (1, 1, 4)]
    one, same, another = (fit(defense, model, clean) for defense, model in zip(defenses, (victim, other, victim), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[9].weight, same[9].weight)
    assert not torch.equal(one[9].weight, another[9].weight)
    assert defenses[0].findings() == {"layer": "9", "restarted": True}


def test_interrupted_is_bit_for_bit_the_uninterrupted(victim, clean, fit, interrupted_and_resumed):
    def make():
        return LastLayer(epochs=4, batch_size=12, restart=True, seed=1)

    straight = fit(make(), victim, clean)
    resumed, _ = interrupted_and_resumed(make, victim, clean, at=5)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())


class ScaledCosine(nn.Module):
    def forward(self, features):
        return 30 * F.normalize(features)[:, :4]


def test_a_cosine_head_is_refused_and_the_reason_said(victim, clean):
    model = nn.Sequential(*list(victim)[:-1], ScaledCosine()).eval()
    with pytest.raises(UserError, match=r"nn\.Linear layer, which is what is trained; use defense=vector_scaling or"):
        LastLayer().prepare(model, *clean)


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}, {"momentum": 1.0}])
def test_settings_that_make_no_sense_name_their_key(settings):
    with pytest.raises(UserError, match=f"defense.{next(iter(settings))} must"):
        LastLayer(**settings)
