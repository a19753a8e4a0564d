"""``marginclip.repair``: its methods, its mistakes, and what it leaves as it was."""

import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import marginclip
from marginclip.clipping import BoundedNetwork
from marginclip.silence import on_gpu_of

LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


class Warns(nn.Module):
    """A network that warns whenever it is called."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        warnings.warn("this network is old", UserWarning, stacklevel=1)
        return self.network(images)


@pytest.fixture
def clean(net):
    """Images (32, 3, 8, 8) and what the network decides for them."""
    images = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return images, net(images).argmax(1)


def test_the_host_is_left_as_it_was(net, clean):
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    filters, draws = list(warnings.filters), torch.get_rng_state()
    with torch.no_grad():
        marginclip.repair(net, *clean, defense=marginclip.MMAC(steps=2, extra_steps=0, check_every=1))
        assert not torch.is_grad_enabled()
    assert warnings.filters == filters
    assert [logging.getLogger(name).level for name in LOGGERS] == [logging.INFO] * len(LOGGERS)
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_warning_of_the_model_reaches_the_user(net, clean):
    with pytest.warns(UserWarning, match="this network is old"):
        marginclip.repair(Warns(net), *clean, defense=marginclip.MMAC(steps=2, extra_steps=0, check_every=1))


@pytest.mark.parametrize("method", ["mmac", "mmom", "mmbm"])
def test_methods_are_the_papers(net, clean, method):
    images, labels = clean
    labels = torch.cat([labels, torch.arange(4)])  # MMOM asks for images of every class
    images = torch.cat([images, torch.rand(4, 3, 8, 8)])
    assert isinstance(marginclip.repair(net, images, labels, method=method), BoundedNetwork)


def test_labels_can_be_int32(net, clean):
    images, labels = clean
    defense = marginclip.MMAC(steps=2, extra_steps=0, check_every=1)
    short, long = (marginclip.repair(net, images, labels.to(kind), defense=defense) for kind in (torch.int32, torch.int64))
    assert torch.equal(short(images), long(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "mmca"}, "method must be one of mmac, mmom, mmbm, auto, got 'mmca'; did you mean 'mmac'?"),
        ({"method": "mmac", "defense": marginclip.MMOM()}, "give repair() a method or a defense, not both"),
    ],
)
def test_mistakes_are_one_sentence(net, clean, settings, message):
    with pytest.raises(marginclip.UserError) as caught:
        marginclip.repair(net, *clean, **settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("cuda:1", {"accelerator": "gpu", "devices": [1]}),
        ("cuda", {"accelerator": "gpu", "devices": [0]}),
        ("cpu", {}),
    ],
)
def test_a_model_on_a_gpu_is_repaired_on_that_one(device, settings):
    class Placed(nn.Module):
        def parameters(self, recurse=True):
            yield SimpleNamespace(device=torch.device(device))

    assert on_gpu_of(Placed()) == settings
    assert on_gpu_of(nn.Flatten()) == {}
