"""The part of a network in front of its bounds, computed once: the same logits and gradients as without."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.clipping.fixed_part import FixedPartCache, caching_pays
from marginclip.models import ResNet


@pytest.fixture
def resnet(settle):
    return settle(ResNet(4, blocks=(1, 1, 1), width=4, shortcut="pad"))


def bounded_network(model, images, **settings):
    bounded = BoundedNetwork(model, images[:1], **settings)
    bounded.set_from_images(images, share=0.4)
    return bounded


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sites", ["last", "all", ["layer2_0_act1"]])
@pytest.mark.parametrize("offsets", [False, True])
def test_logits_and_gradients_are_those_of_the_whole_network(resnet, images, fused, sites, offsets):
    bounded = bounded_network(resnet, images, sites=sites, offsets=offsets, scaled=offsets)
    network = bounded.fused() if fused else bounded
    if offsets:
        with torch.no_grad():
            bounded.offsets.value.copy_(torch.randn(4))
            bounded.offsets.scale.fill_(0.7)
    cache = FixedPartCache(network, images, batch_size=5)
    rows, labels = torch.tensor([7, 0, 3]), torch.tensor([0, 1, 2])
    learned = [*bounded.bound_parameters(), *(bounded.offsets.parameters() if offsets else [])]
    gradients = []
    for logits in (network(images[rows]), cache(rows)):
        gradients.append(torch.autograd.grad(F.cross_entropy(logits, labels), learned))
    torch.testing.assert_close(cache(rows), network(images[rows]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_it_follows_the_bounds_and_can_be_asked_again(resnet, images):
    """The network adds in place behind its bound; the kept values stay what they were."""
    bounded = bounded_network(resnet, images, sites="last")
    cache = FixedPartCache(bounded, images)
    rows = torch.arange(12)
    first = cache(rows)
    assert torch.equal(cache(rows), first)
    with torch.no_grad():
        bounded.bound_parameters()[0].mul_(0.5)
    torch.testing.assert_close(cache(rows), bounded(images))
    assert not torch.allclose(cache(rows), first)


def test_writing_in_place_does_not_reach_what_is_kept(images):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x):
            x = F.relu(self.first(x))
            x.mul_(2)
            return self.head(x.mean((2, 3)))

    bounded = bounded_network(Writes().eval(), images)
    cache = FixedPartCache(bounded, images)
    for _ in range(2):
        torch.testing.assert_close(cache(torch.arange(12)), bounded(images))


def test_the_layers_in_front_run_once(resnet, images):
    bounded = bounded_network(resnet, images, sites="last")
    calls = []
    bounded.network.get_submodule("conv1").register_forward_hook(lambda *_: calls.append(1))
    cache = FixedPartCache(bounded, images, batch_size=6)
    for _ in range(3):
        cache(torch.arange(4))
    assert len(calls) == 2


def test_it_pays_late_in_the_network(settle, images):
    model = settle(ResNet(4, blocks=(1, 1, 1), width=8))
    last = BoundedNetwork(model, images[:1], sites="last")
    assert caching_pays(last, images[:1], 500)
    assert not caching_pays(last, images[:1], 10**8)  # it would not fit into memory
    assert not caching_pays(BoundedNetwork(model, images[:1]), images[:1], 500)


@pytest.mark.parametrize("settings", [{}, {"blocks": (3, 3, 3), "width": 16, "shortcut": "pad"}])
def test_it_pays_for_mmom_on_the_shipped_networks(settings):
    image = torch.rand(1, 3, 32, 32)
    assert caching_pays(BoundedNetwork(ResNet(10, **settings).eval(), image, sites="last"), image, 500)


def test_it_does_not_pay_where_the_network_carries_the_size_of_the_batch(images):
    class Carries(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(192, 5), nn.Linear(5, 3)

        def forward(self, x):
            size = x.size(0)
            return self.head(F.relu(self.hidden(x.flatten(1))).view(size, 5))

    model = Carries().eval()
    assert not caching_pays(BoundedNetwork(model, images[:1]), images[:1], 500)
