"""Fine-tuning: each step against plain autograd, the order of batches, batch norm, and going on after an interruption."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.data import Augment
from marginclip.defenses import FineTune
from marginclip.errors import UserError


def slow_sgd(model, clean, defense, *, frozen):
    """The textbook: gradient plus weight decay, a velocity, and a step, one parameter at a time."""
    images, labels = clean
    network = copy.deepcopy(model)
    velocity = {name: torch.zeros_like(value) for name, value in network.named_parameters()}
    for epoch in range(defense.epochs):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and frozen:
                module.eval()
        for index in range(defense.steps_per_epoch):
            rows = defense._rows(epoch, index)
            loss = F.cross_entropy(network(images[rows]), labels[rows])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for (name, value), gradient in zip(network.named_parameters(), gradients, strict=True):
                    velocity[name] = defense.momentum * velocity[name] + gradient + defense.weight_decay * value
                    value -= defense.learning_rate * velocity[name]
    return network.eval()


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_is_textbook_sgd(victim, clean, batch_norm, fit):
    defense = FineTune(epochs=3, batch_size=10, learning_rate=0.05, weight_decay=0.1, batch_norm=batch_norm, seed=2)
    repaired = fit(defense, victim, clean)
    wanted = slow_sgd(victim, clean, defense, frozen=batch_norm == "frozen")
    assert repaired.state_dict().keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(repaired.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    assert len(defense.history) == 3
    assert not torch.allclose(repaired(clean[0]), victim(clean[0]), atol=1e-3)


def test_frozen_statistics_are_the_models_own_and_trained_ones_move(victim, clean, fit):
    frozen, moved = (fit(FineTune(epochs=1, batch_norm=mode), victim, clean) for mode in ("frozen", "train"))
    for name, value in victim.named_buffers():
        assert torch.equal(dict(frozen.named_buffers())[name], value)
    assert not torch.equal(moved[1].running_mean, victim[1].running_mean)
    assert not torch.equal(frozen[1].weight, victim[1].weight)


def test_a_frozen_model_can_be_fine_tuned(victim, clean, fit):
    repaired = fit(FineTune(epochs=1), victim.requires_grad_(False), clean)
    assert not torch.equal(repaired[0].weight, victim[0].weight)


def test_an_epoch_is_a_pass_in_an_order_of_its_own(victim, clean):
    defense = FineTune(batch_size=10, seed=1)
    defense.prepare(victim, *clean)
    passes = [[defense._rows(epoch, index) for index in range(defense.steps_per_epoch)] for epoch in (0, 1)]
    for batches in passes:
        assert torch.cat(batches).sort().values.tolist() == list(range(24))
        assert [len(batch) for batch in batches] == [8, 8, 8]  # no batch of a few images, which batch norm could not stand
    assert not torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))
    other = FineTune(batch_size=10, seed=2)
    other.prepare(victim, *clean)
    assert not torch.equal(other._rows(0, 0), passes[0][0])


def test_augmentation_sees_every_batch_and_differs_between_steps(victim, clean, fit):
    seen = []

    def noting(images, generator):
        seen.append(torch.rand(2, generator=generator).tolist())
        return images

    for _ in range(2):
        fit(FineTune(epochs=2, batch_size=12, augmentation=noting), victim, clean)
    assert seen[:4] == seen[4:]
    assert len({tuple(numbers) for numbers in seen}) == 4


def test_all_clean_images_are_used_also_those_that_the_model_gets_wrong(victim, clean, fit):
    images, labels = clean
    defense = FineTune(epochs=1)
    fit(defense, victim, (images, (labels + 1) % 4))
    assert torch.equal(defense.images, images)
    assert torch.equal(defense.labels, (labels + 1) % 4)


@pytest.mark.parametrize("at", [3, 7])
def test_interrupted_is_bit_for_bit_the_uninterrupted(victim, clean, at, fit, interrupted_and_resumed):
    model = nn.Sequential(victim[:6], nn.Dropout(0.5), victim[6:])

    def make():
        return FineTune(epochs=4, batch_size=12, augmentation=Augment(crop_padding=1, flip=True), seed=3)

    straight = fit(through := make(), model, clean)
    resumed, again = interrupted_and_resumed(make, model, clean, at=at)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    assert again.history == through.history


def test_draws_of_others_are_left_alone(victim, clean, fit):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fit(FineTune(epochs=1), victim, clean)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "defense.epochs"),
        ({"batch_size": 1}, "defense.batch_size"),
        ({"learning_rate": 0.0}, "defense.learning_rate"),
        ({"momentum": 1.0}, "defense.momentum"),
        ({"momentum": 0.0, "nesterov": True}, "defense.nesterov"),
        ({"weight_decay": -1.0}, "defense.weight_decay"),
        ({"batch_norm": "eval"}, "defense.batch_norm"),
    ],
)
def test_settings_that_make_no_sense_name_their_key(settings, message):
    with pytest.raises(UserError, match=message):
        FineTune(**settings)


def test_divergence_says_what_to_do(victim, clean, fit):
    with pytest.raises(UserError, match=r"fine-tuning diverged: .* try a lower defense\.learning_rate"):
        fit(FineTune(learning_rate=1e20), victim, clean)
