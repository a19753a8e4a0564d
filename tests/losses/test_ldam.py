"""LDAM and deferred re-weighting: the published margins and weights, the loss by loops, when weights begin."""

import math

import pytest
import torch
from torch import nn

from marginclip.errors import UserError
from marginclip.losses import LDAM
from marginclip.losses.ldam import effective_weights, ldam_margins

COUNTS = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])


def batch():
    generator = torch.Generator().manual_seed(4)
    return torch.rand(12, 2, 2, 2, generator=generator), torch.arange(12) % 10


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 10))


def test_margins_by_the_formula():
    margins = ldam_margins(COUNTS, largest=0.5)
    assert margins.tolist() == pytest.approx([0.5 * (count / 50) ** -0.25 for count in COUNTS.tolist()])
    assert margins[0].item() == pytest.approx(0.1581, abs=1e-4)
    assert ldam_margins(torch.tensor([5000, 500]), largest=0.5)[0].item() == pytest.approx(0.2812, abs=1e-4)


def test_weights_are_the_published_ones():
    weights = effective_weights(COUNTS, beta=0.9999)
    published = [0.0506, 0.0769, 0.1211, 0.195, 0.3188, 0.5246, 0.8683, 1.4426, 2.4092, 3.9927]
    assert weights.tolist() == pytest.approx(published, abs=1e-4)
    assert weights.sum().item() == pytest.approx(10)
    assert effective_weights(COUNTS, beta=0.0).tolist() == [1.0] * 10


@pytest.mark.parametrize("epoch", [0, 9])
def test_the_loss_by_loops(epoch):
    loss = LDAM(scale=30)
    model, (images, labels) = loss.adapt(linear(), COUNTS), batch()
    loss.begin_epoch(epoch, 10)
    logits, margins = model(images).tolist(), ldam_margins(COUNTS, largest=0.5).tolist()
    weights = effective_weights(COUNTS, beta=0.9999).tolist() if epoch == 9 else [1.0] * 10
    total = 0.0
    for row, label in zip(logits, labels.tolist(), strict=True):
        row[label] -= 30 * margins[label]
        total += weights[label] * (math.log(sum(math.exp(value) for value in row)) - row[label])
    wanted = total / sum(weights[label] for label in labels.tolist())
    assert loss(model, images, labels, torch.Generator()).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("share", "epochs", "first"), [(0.8, 200, 160), (0.8, 1000, 800), (0.8, 3, 2), (0.0, 5, 0), (1.0, 5, 5)]
)
def test_weights_begin_at_a_share_of_the_epochs(share, epochs, first):
    loss, seen = LDAM(reweight_from=share), []
    for epoch in range(epochs):
        loss.begin_epoch(epoch, epochs)
        seen.append(loss.reweighted)
    assert seen == [False] * first + [True] * (epochs - first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0}, "loss=ldam: scale must be positive, got 0"),
        ({"largest_margin": 3}, "loss=ldam: largest_margin must be in [0, 2], got 3"),
        ({"beta": 1}, "loss=ldam: beta must be in [0, 1), got 1"),
        ({"reweight_from": 160}, "loss=ldam: reweight_from must be a share in [0, 1], got 160"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings, message):
    with pytest.raises(UserError) as caught:
        LDAM(**settings)
    assert str(caught.value) == message
