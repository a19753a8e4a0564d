"""Fine-pruning: which channels go, when it stops, what is left of them, each against a slow version."""

import copy

import pytest
import torch
from torch import nn

from marginclip.defenses import FinePruning
from marginclip.defenses.cross_fitting import stratified_share
from marginclip.defenses.weights.held_out import last_within
from marginclip.errors import UserError
from marginclip.networks.heads import final_linear


def prepared(model, clean, **settings):
    defense = FinePruning(**settings)
    defense.prepare(model, *clean)
    return defense


def without(model, channels):
    """The model with some inputs of its last layer masked, weights as they were."""

    class Mask(nn.Module):
        def forward(self, x):
            mask = torch.ones(x.shape[1])
            mask[channels] = 0
            return x * mask

    return nn.Sequential(*copy.deepcopy(list(model)[:-1]), Mask(), copy.deepcopy(model[-1]))


@torch.no_grad()
def activity(model, images):
    """The mean of every input of the last layer, image by image."""
    rows = [nn.Sequential(*list(model)[:-1])(image.unsqueeze(0))[0] for image in images]
    return torch.stack(rows).mean(0)


def accuracy(model, images, labels):
    with torch.no_grad():
        return sum(
            int(model(image.unsqueeze(0)).argmax()) == int(label) for image, label in zip(images, labels, strict=True)
        ) / len(labels)


def test_order_is_that_of_the_mean_activation_on_the_clean_set(victim, clean):
    defense = prepared(victim, clean)
    torch.testing.assert_close(defense.activity, activity(victim, clean[0]))
    off = (~defense.kept).nonzero().flatten()
    assert set(off.tolist()) == set(activity(victim, clean[0]).argsort()[: defense.num_pruned].tolist())


def test_pruning_no_channel_is_the_model_itself(victim, clean):
    defense = prepared(victim, clean)
    assert defense.curve[0] == pytest.approx(accuracy(victim, *held_out(clean)))
    keen = prepared(victim, clean, max_drop=0.0)
    keen.curve[1:] = 0
    assert last_within(keen.curve, 0.0) == 0
    same = without(victim, [])
    assert torch.equal(same(clean[0]), victim(clean[0]))


def test_pruning_all_channels_leaves_the_bias(victim, clean):
    defense = prepared(victim, clean, max_drop=1.0)
    assert defense.num_pruned == 8
    pruned = defense.variants()["fine_pruning_pruned"].network
    torch.testing.assert_close(pruned(clean[0]), victim[-1].bias.expand(24, 4))


def held_out(clean, share=0.2, seed=0):
    held = stratified_share(clean[1], share, seed)
    return clean[0][held], clean[1][held]


@pytest.mark.parametrize(("share", "seed"), [(0.2, 0), (0.4, 0), (0.5, 1)])
def test_curve_is_the_accuracy_of_masked_networks_on_the_held_out_part(victim, clean, share, seed):
    defense = prepared(victim, clean, held_out_share=share, seed=seed)
    order = activity(victim, clean[0]).argsort()
    slow = [accuracy(without(victim, order[:count]), *held_out(clean, share, seed)) for count in range(9)]
    assert defense.curve.tolist() == pytest.approx(slow)
    assert len(set(slow)) > 1, "choose a victim that pruning hurts"


def test_pruned_network_is_the_masked_one(victim, clean):
    defense = prepared(victim, clean, max_drop=0.3)
    off = (~defense.kept).nonzero().flatten()
    assert 0 < len(off) < 8
    pruned = defense.variants()["fine_pruning_pruned"].network
    torch.testing.assert_close(pruned(clean[0]), without(victim, off)(clean[0]))


@pytest.mark.parametrize(
    ("curve", "max_drop", "wanted"),
    [
        ([0.9, 0.9, 0.88, 0.86, 0.5], 0.04, 3),  # the set that breaks the budget is not kept (no alias of it, no off-by-one)
        ([0.9, 0.95, 0.9], 0.04, 2),  # a gain is no loss (a budget on |change| would stop)
        ([0.9, 0.8, 0.9, 0.9], 0.04, 0),  # the first break ends it
        ([0.9, 0.9 - 0.04, 0.1], 0.04, 1),  # exactly the budget is within it
        ([0.9, 0.1, 0.1], 1.0, 2),
    ],
)
def test_stops_before_the_budget_is_broken(curve, max_drop, wanted):
    assert last_within(torch.tensor(curve), max_drop) == wanted


@pytest.mark.parametrize("max_drop", [0.0, 0.1, 0.3])
def test_no_accuracy_beyond_the_budget_is_lost(victim, clean, max_drop):
    defense = prepared(victim, clean, max_drop=max_drop)
    pruned = defense.variants()["fine_pruning_pruned"].network
    before, after = (accuracy(network, *held_out(clean)) for network in (victim, pruned))
    assert after >= before - max_drop - 1e-6
    assert defense.findings()["held_out_accuracy_pruned"] == pytest.approx(after)
    order = activity(victim, clean[0]).argsort()
    if defense.num_pruned < 8:
        assert accuracy(without(victim, order[: defense.num_pruned + 1]), *held_out(clean)) < before - max_drop


def test_pruned_channels_stay_off_through_fine_tuning(victim, clean, fit):
    defense = FinePruning(max_drop=0.3, epochs=5, learning_rate=0.05, weight_decay=0.01)
    repaired = fit(defense, victim, clean)
    pruned = defense.variants()["fine_pruning_pruned"].network
    assert 0 < int((~defense.kept).sum()) < 8
    assert torch.equal(repaired[-1].weight[:, ~defense.kept], torch.zeros(4, defense.num_pruned))
    assert not torch.equal(repaired[-1].weight[:, defense.kept], pruned[-1].weight[:, defense.kept])
    assert not torch.equal(repaired[0].weight, pruned[0].weight)
    assert torch.equal(pruned[0].weight, victim[0].weight)


def test_interrupted_is_bit_for_bit_the_uninterrupted(victim, clean, fit, interrupted_and_resumed):
    def make():
        return FinePruning(epochs=4, batch_size=12, max_drop=0.3, seed=1)

    straight = fit(make(), victim, clean)
    resumed, _ = interrupted_and_resumed(make, victim, clean, at=5)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())


class Reversed(nn.Module):
    """Its classifier was made before its feature extractor and another linear layer, and it branches on values."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.features = nn.Conv2d(1, 6, 3)
        self.gate = nn.Linear(6, 4)

    def forward(self, images):
        pooled = self.features(images).relu().mean((2, 3))
        return self.head(pooled * self.gate(pooled).sigmoid().sum(1, keepdim=True) if images.sum() > 0 else pooled)


def test_final_layer_is_the_one_that_gives_the_logits(clean, fit):
    model = Reversed().eval()
    assert final_linear(model, clean[0], needed_for="", instead="") == ("head", model.head)
    labels = model(clean[0]).argmax(1)
    repaired = fit(FinePruning(epochs=1, max_drop=0.5), model, (clean[0], labels))
    assert repaired(clean[0]).shape == (24, 4)


def test_model_without_a_final_linear_layer_is_refused(clean):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(UserError, match=r"do not come from an nn\.Linear"):
        prepared(model, clean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_drop": 4}, r"defense\.max_drop .* did you mean 0\.04"), ({"held_out_share": 0.0}, "held_out_share"), ({"epochs": 0}, "epochs")],
)  # fmt: skip
def test_settings_that_make_no_sense_name_their_key(settings, message):
    with pytest.raises(UserError, match=message):
        FinePruning(**settings)
