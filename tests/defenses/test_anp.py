"""Adversarial neuron pruning: masks and changes against layers changed by hand, what is pruned, and who chooses the threshold."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.defenses import ANP
from marginclip.defenses.cross_fitting import stratified_share
from marginclip.defenses.weights.anp import THRESHOLDS, neuron_layers
from marginclip.errors import UserError

SHORT = {"steps": 6, "batch_size": 10}


def prepared(model, clean, **settings):
    defense = ANP(**settings)
    defense.prepare(model, *clean)
    return defense


def changed_by_hand(model, masks, noise):
    """The model with weights (m + d) w and biases (1 + e) b written into its batch norms."""
    changed = copy.deepcopy(model)
    norms = [module for module in changed.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm, mask, (d, e) in zip(norms, masks, noise, strict=True):
            for channel in range(len(mask)):
                norm.weight[channel] *= mask[channel] + d[channel]
                norm.bias[channel] *= 1 + e[channel]
    return changed


def test_one_image_a_class_leaves_nothing_to_learn_from(victim, clean):
    images, labels = clean
    with pytest.raises(
        UserError, match=r"ANP has nothing to learn from: defense.held_out_share=0.2 takes at least one clean image"
    ):
        ANP(**SHORT).fit(victim, images[:4], labels[:4])
    ANP(**SHORT, threshold=0.2).fit(victim, images[:4], labels[:4])
    ANP(**SHORT).fit(victim, images[:5], labels[:5])


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_loss_is_that_of_networks_changed_by_hand(victim, clean, batch_norm):
    defense = prepared(victim, clean, batch_norm=batch_norm, threshold=0.5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mask in defense.masks:
            mask.copy_(torch.rand(len(mask), generator=generator))
    noise = [tuple(0.8 * torch.rand(len(mask), generator=generator) - 0.4 for _ in range(2)) for mask in defense.masks]
    defense.worst_noise = lambda images, labels: noise
    defense.before_epoch(0)
    none = [(torch.zeros(len(mask)),) * 2 for mask in defense.masks]
    networks = [changed_by_hand(victim, [*defense.masks], each) for each in (none, noise)]
    for network in networks:
        network.train(batch_norm == "train")
    natural, robust = (F.cross_entropy(network(clean[0]), clean[1]) for network in networks)
    torch.testing.assert_close(defense.loss(*clean), 0.2 * natural + 0.8 * robust)


def test_the_worst_noise_stays_in_its_box_and_is_worse_than_its_start(victim, clean):
    defense = prepared(victim, clean, threshold=0.5, noise=0.1, noise_steps=4, batch_norm="frozen")
    defense.before_epoch(0)
    torch.manual_seed(0)
    start = [(defense._drawn(mask), defense._drawn(mask)) for mask in defense.masks]
    torch.manual_seed(0)
    found = defense.worst_noise(*clean)
    losses = [float(F.cross_entropy(defense.masked(clean[0], noise), clean[1]).detach()) for noise in (start, found)]
    assert losses[1] > losses[0]
    assert max(float(each.abs().max()) for pair in found for each in pair) <= 0.1 + 1e-6
    assert sum(len(each) for pair in found for each in pair) == 2 * (4 + 6)


def test_neurons_below_the_threshold_have_no_weight_and_all_else_is_the_models(victim, clean, fit):
    defense = ANP(**SHORT, threshold=0.9, learning_rate=2.0)
    pruned = fit(defense, victim, clean).state_dict()
    masks = torch.cat([mask.detach() for mask in defense.masks])
    assert 0 < defense.findings()["pruned"] == int((masks < 0.9).sum()) < 10
    assert float(masks.min()) >= 0 and float(masks.max()) <= 1
    weights = torch.cat([pruned["1.weight"], pruned["4.weight"]])
    own = torch.cat([victim[1].weight, victim[4].weight])
    assert torch.equal(weights, torch.where(masks < 0.9, torch.zeros(10), own))
    others = {name: value for name, value in victim.state_dict().items() if name not in ("1.weight", "4.weight")}
    assert all(torch.equal(value, pruned[name]) for name, value in others.items())


def test_a_neuron_that_only_does_harm_gets_the_smallest_mask(victim, clean, fit):
    """Its output is added to the first class's logit for every image; nothing but the mask can take it away."""

    class Harmed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.norm = copy.deepcopy(victim), nn.BatchNorm2d(1)
            with torch.no_grad():
                self.norm.weight.fill_(3.0)
                self.norm.bias.fill_(0.0)

        def forward(self, images):
            harm = F.pad(self.norm(images).mean((2, 3)) * 8, (0, 3))
            return self.network(images) + harm

    defense = ANP(steps=40, batch_size=24, threshold=0.2, batch_norm="frozen")
    fit(defense, Harmed().eval(), clean)
    masks = torch.cat([mask.detach() for mask in defense.masks])
    assert defense.layers[-1] == "norm"
    assert masks.argmin() == len(masks) - 1


def test_the_threshold_is_chosen_on_images_that_were_not_learned_from(victim, clean, fit):
    defense = ANP(**SHORT, learning_rate=2.0, max_drop=0.1, held_out_share=0.25, seed=3)
    repaired = fit(defense, victim, clean)
    out = stratified_share(clean[1], 0.25, 3)
    assert torch.equal(defense.images, clean[0][~out])
    own = [float((defense._pruned(each)(clean[0][out]).argmax(1) == clean[1][out]).float().mean()) for each in THRESHOLDS]
    assert defense.curve.tolist() == pytest.approx(own)
    allowed = next((place for place, value in enumerate(own) if value < own[0] - 0.1 - 1e-6), len(own)) - 1
    assert defense.findings()["threshold"] == THRESHOLDS[allowed]
    assert torch.equal(repaired(clean[0]), defense._pruned(THRESHOLDS[allowed])(clean[0]))


def test_without_noise_and_threshold_masks_stay_and_the_model_too(victim, clean, fit):
    defense = ANP(steps=1, noise=0.0, threshold=0.0)
    assert torch.equal(fit(defense, victim, clean)(clean[0]), victim(clean[0]))


def test_without_batch_norms_hidden_layers_are_pruned(plain_victim, clean, fit):
    assert neuron_layers(plain_victim, clean[0]) == ["0", "3", "7"]
    repaired = fit(ANP(**SHORT, threshold=1.0, learning_rate=2.0), plain_victim, clean)
    assert (repaired[0].weight.flatten(1).abs().sum(1) == 0).any()
    assert torch.equal(repaired[9].weight, plain_victim[9].weight)


@pytest.mark.parametrize("at", [3, 5])
def test_interrupted_is_bit_for_bit_the_uninterrupted(victim, clean, at, fit, interrupted_and_resumed):
    def make():
        return ANP(**SHORT, learning_rate=2.0, seed=1)

    straight = make()
    network = fit(straight, victim, clean)
    resumed, again = interrupted_and_resumed(make, victim, clean, at=at)
    assert all(torch.equal(one, other) for one, other in zip(straight.masks, again.masks, strict=True))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "defense.steps must be at least 1, got 0"),
        ({"noise": -0.1}, "defense.noise must not be negative"),
        ({"noise_steps": 0}, "defense.noise_steps"),
        ({"alpha": 2.0}, r"defense.alpha must be in \[0, 1\], got 2"),
        ({"threshold": 1.5}, "defense.threshold must be null or in"),
        ({"max_drop": -1.0}, "defense.max_drop"),
        ({"held_out_share": 0.6}, "defense.held_out_share"),
    ],
)
def test_settings_that_make_no_sense_name_their_key(settings, message):
    with pytest.raises(UserError, match=message):
        ANP(**settings)
