"""Architectures from elsewhere: what is called with what, and a sentence for each way in which somebody else's code fails."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
from torch import nn

from marginclip import BoundedNetwork
from marginclip.errors import UserError
from marginclip.models import imported_model, timm_model

CODE = """
import torch
from torch import nn

class Answer:
    def __init__(self, logits):
        self.logits = logits

class Wrapped(nn.Module):
    def __init__(self, network, kind):
        super().__init__()
        self.network, self.kind = network, kind
    def forward(self, images):
        logits = self.network(images)
        return {"logits": logits} if self.kind == "dictionary" else Answer(logits)

def factory(num_classes, in_channels, hidden=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(16 * in_channels, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

def wrapped(num_classes, kind):
    return Wrapped(factory(num_classes, 3), kind)

def needs(more):
    return nn.Identity()

def no_module():
    return 3

def broken():
    raise KeyError("no weights here")

not_callable = 3
"""


@pytest.fixture
def code(tmp_path):
    """A file of somebody else's code; gives the target of one of its functions."""
    file = tmp_path / "theirs.py"
    file.write_text(CODE)
    return lambda name: f"{file}:{name}"


def test_a_file_is_run_and_its_factory_told_the_sizes(code):
    model = imported_model(7, 3, target=code("factory"), arguments={"hidden": 9}, mean=[0.5] * 3, std=[0.25] * 3)
    images = torch.rand(4, 3, 4, 4)
    assert model(images).shape == (4, 7)
    assert model.network[1].out_features == 9
    torch.testing.assert_close(model(images), model.network((images - 0.5) / 0.25))


def test_a_module_is_imported_and_its_arguments_override_the_sizes():
    model = imported_model(7, 3, target="torchvision.models:resnet18", arguments={"num_classes": 5}).eval()
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("kind", ["dictionary", "object"])
def test_logits_are_taken_out_of_what_is_returned_and_the_network_can_be_bounded(code, kind):
    model = imported_model(6, 3, target=code("wrapped"), arguments={"kind": kind}, output="logits").eval()
    images = torch.rand(3, 3, 4, 4)
    bounded = BoundedNetwork(model, images)
    assert len(list(bounded.each())) == 1
    assert torch.equal(bounded(images), model(images))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "has no 'absent' that could be called"),
        ("factry", "did you mean 'factory'?"),
        ("not_callable", "has no 'not_callable' that could be called"),
        ("needs", "fails: .*missing 1 required positional argument: 'more'.*; model.arguments are its arguments"),
        ("no_module", "must make a torch.nn.Module, it makes a int"),
        ("broken", "fails: 'no weights here'"),
    ],
)
def test_a_factory_that_cannot_be_used_is_one_sentence(code, name, message):
    with pytest.raises(UserError, match=message):
        imported_model(3, target=code(name))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "model.target must be package.module:factory or path/to/file.py:factory, got None"),
        ("torchvision.models", "got 'torchvision.models'"),
        ("nowhere.at_all:make", r"cannot be imported \(No module named 'nowhere'\)"),
        ("nowhere.py:make", r"cannot be imported \('nowhere.py' is not a file\)"),
    ],
)
def test_a_target_that_cannot_be_found_is_one_sentence(target, message):
    with pytest.raises(UserError, match=message):
        imported_model(3, target=target)


def test_models_of_timm_are_made_and_bounded_bit_for_bit():
    pytest.importorskip("timm")
    model = timm_model(5, network="resnet10t").eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(BoundedNetwork(model, images)(images), model(images))
    with pytest.raises(UserError, match=r"model.network 'resnet10x' is not a model of timm; did you mean 'resnet10t'"):
        timm_model(5, network="resnet10x")
    with pytest.raises(UserError, match=r"model.network=resnet10t cannot be made: .*depth"):
        timm_model(5, network="resnet10t", arguments={"depth": 3})


def test_a_network_that_needs_no_sizes_is_called_without(tmp_path):
    (tmp_path / "plain.py").write_text("from torch import nn\ndef make():\n    return nn.Flatten()\n")
    model = imported_model(3, 1, target=f"{tmp_path / 'plain.py'}:make")
    assert isinstance(model.network, nn.Flatten)


SETTINGS = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Settings:
    width: int = 4

class Net(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.settings, self.layer = settings, nn.Linear(settings.width, 3)
    def forward(self, images):
        return self.layer(images)

def make():
    return Net(Settings())
"""


def test_a_file_takes_the_place_of_no_module(tmp_path):
    """Neither of one that is imported nor of one that will be."""
    names = "safetensors", "colorsys"  # colorsys: of the standard library; nothing here imports it
    before = sys.modules["safetensors"]
    for name in names:
        (tmp_path / f"{name}.py").write_text(SETTINGS)
        imported_model(3, target=f"{tmp_path / name}.py:make")
    assert sys.modules["safetensors"] is before
    assert importlib.import_module("colorsys").__file__ != str(tmp_path / "colorsys.py")


def test_a_network_of_a_file_is_pickled_and_copied(tmp_path):
    (tmp_path / "nets.py").write_text(SETTINGS)
    model = imported_model(3, target=f"{tmp_path / 'nets.py'}:make").network
    images = torch.rand(2, 4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and other.settings == model.settings
        assert torch.equal(other(images), model(images))


def test_another_process_unpickles_a_network_of_a_file(tmp_path, monkeypatch):
    """As the processes of several devices do, which have not imported the file."""
    (tmp_path / "nets.py").write_text(SETTINGS)
    model = imported_model(3, target=f"{tmp_path / 'nets.py'}:make").network
    pickled = pickle.dumps(model)
    monkeypatch.delitem(sys.modules, type(model).__module__)
    other = pickle.loads(pickled)
    assert type(other) is not type(model)
    assert torch.equal(other(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_a_file_is_run_once_for_each_content(tmp_path, monkeypatch):
    file = tmp_path / "nets.py"
    file.write_text(SETTINGS)
    first = imported_model(3, target=f"{file}:make").network
    monkeypatch.chdir(tmp_path)
    assert type(imported_model(3, target="nets.py:make").network) is type(first)
    file.write_text(SETTINGS.replace("width: int = 4", "width: int = 50"))
    assert imported_model(3, target="nets.py:make").network.settings.width == 50
    assert type(pickle.loads(pickle.dumps(first))) is type(first)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "nets.py").write_text(SETTINGS)
    assert type(imported_model(3, target="other/nets.py:make").network) is not type(first)


@pytest.mark.parametrize("fault", ["raise KeyError('no weights here')", "raise SystemExit", "def ("])
def test_a_file_that_fails_leaves_nothing_behind(tmp_path, fault):
    before = set(sys.modules)
    (tmp_path / "broken.py").write_text(fault)
    with pytest.raises((UserError, SystemExit)):
        imported_model(3, target=f"{tmp_path / 'broken.py'}:make")
    assert set(sys.modules) == before
