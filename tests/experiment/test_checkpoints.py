"""Checkpoints of other people: every way of wrapping is understood, nothing in a file is executed, and odd ones are refused."""

import os
import pickle
import random
import struct

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from marginclip.errors import UserError
from marginclip.experiment.checkpoints import file_digest, load_checkpoint
from marginclip.experiment.whole_checkpoints import WholeCheckpoints
from marginclip.models import ResNet, TorchvisionModel
from marginclip.training import PoisonedTraining


def network(seed=0, width=2):
    torch.manual_seed(seed)
    return ResNet(3, blocks=(1, 1), width=width)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def with_extra_head():
    model = network()
    model.head = nn.Linear(4, 2)
    return model


@pytest.fixture
def given():
    return network(seed=1)


WRAPPINGS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state, "arch": "resnet"},
    "nested": lambda state: {"model": {"state_dict": state}},
    "module": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled in DataParallel": lambda state: {"net": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    "other names": lambda state: {
        key.replace(".shortcut.", ".downsample.").replace("linear.", "fc."): value for key, value in state.items()
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_state_dicts_load(tmp_path, given, wrapping):
    torch.save(WRAPPINGS[wrapping](given.state_dict()), tmp_path / "model.pt")
    model = network()
    assert not same(model, given)
    load_checkpoint(str(tmp_path / "model.pt"), model)
    assert same(model, given)


def test_safetensors_load(tmp_path, given):
    save_file({f"module.{key}": value for key, value in given.state_dict().items()}, tmp_path / "model.safetensors")
    model = network()
    load_checkpoint(str(tmp_path / "model.safetensors"), model)
    assert same(model, given)


def test_lightning_checkpoint_of_ours_loads(tmp_path, given):
    module = PoisonedTraining(given, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = network()
    load_checkpoint(str(tmp_path / "last.ckpt"), model)
    assert same(model, given)


def test_torchvision_names_load_into_a_torchvision_model(tmp_path):
    torch.manual_seed(2)
    theirs = resnet18(num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    model = TorchvisionModel(3, network="resnet18")
    load_checkpoint(str(tmp_path / "model.pth"), model)
    assert same(model.network, theirs)


class Bomb:
    """Pickles into a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.safetensors", "model.pkl"])
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path, given, name):
    content = {"state_dict": given.state_dict(), "extra": Bomb(tmp_path / "executed")}
    torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=r"could run code|no complete safetensors"):
        load_checkpoint(str(tmp_path / name), network())
    assert not (tmp_path / "executed").exists()
    (tmp_path / name).write_bytes(pickle.dumps(content["extra"]))
    with pytest.raises(UserError, match=r"could run code|no complete safetensors|truncated"):
        load_checkpoint(str(tmp_path / name), network())
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(content["extra"]))  # the bomb is live: plain unpickling does run it
    assert (tmp_path / "executed").exists()


def test_whole_pickled_model_is_refused(tmp_path, given):
    torch.save(given, tmp_path / "model.pt")
    with pytest.raises(UserError, match="could run code"):
        load_checkpoint(str(tmp_path / "model.pt"), network())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_truncated_file_is_refused(tmp_path, given, suffix, share):
    path = tmp_path / f"model{suffix}"
    save_file(given.state_dict(), path) if suffix == ".safetensors" else torch.save(given.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"truncated|damaged|no complete") as caught:
        load_checkpoint(str(path), network())
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, given, zipped):
    """Bytes of its pickle at random: torch meets them as AttributeError, TypeError, IndexError, struct.error and others."""
    path, generator = tmp_path / "model.pt", random.Random(0)
    torch.save(given.state_dict(), path, _use_new_zipfile_serialization=zipped)
    content, told = path.read_bytes(), []
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 20)):
            damaged[generator.randrange(3000)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(str(path), network())
        except UserError as error:
            told.append(str(error))
    assert len(told) > 50
    assert all(str(path) in message and "\n" not in message for message in told)


@pytest.mark.parametrize("error", [AttributeError, TypeError, IndexError, AssertionError, struct.error, KeyError])
def test_whatever_torch_raises_for_a_damaged_file_is_told_with_its_name(tmp_path, given, monkeypatch, error):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": given.state_dict()}, path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: raise_(error))
    with pytest.raises(UserError, match=rf"last\.ckpt' is truncated, damaged or no checkpoint \({error.__name__}\)"):
        load_checkpoint(str(path), network())
    with pytest.raises(UserError, match=rf"last\.ckpt' is damaged \({error.__name__}\): remove it"):
        WholeCheckpoints().load_checkpoint(path)


@pytest.mark.parametrize("error", [MemoryError, FileNotFoundError, PermissionError])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(tmp_path, given, monkeypatch, error):
    """What goes on from it would tell to remove it."""
    torch.save({"state_dict": given.state_dict()}, tmp_path / "last.ckpt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: raise_(error))
    with pytest.raises(error):
        WholeCheckpoints().load_checkpoint(tmp_path / "last.ckpt")


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("other", "detail"),
    [
        (lambda: network(width=3), "shape"),
        (with_extra_head, "'head.bias' is not part of"),
        (lambda: ResNet(3, blocks=(1,), width=2), "'layer2.*' is missing|shape"),
        (lambda: nn.Linear(3, 3), "missing"),
    ],
)
def test_another_architecture_is_refused(tmp_path, other, detail):
    torch.save(other().state_dict(), tmp_path / "model.pt")
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=f"of another architecture than the model .*({detail}).*model.width"):
        load_checkpoint(str(tmp_path / "model.pt"), model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"), [({"epoch": 3}, "holds no weights"), ([1, 2], "holds no weights"), ({}, "holds no weights")]
)
def test_file_without_weights_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=message):
        load_checkpoint(str(tmp_path / "model.pt"), network())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, given, value):
    given.linear.bias.data[1] = value
    torch.save(given.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"NaN or infinite weights in 'linear\.bias'"):
        load_checkpoint(str(tmp_path / "model.pt"), network())


@pytest.mark.parametrize(
    ("path", "message"), [(None, "needs victim.path"), ("nowhere.pt", "'nowhere.pt' is not a file"), (".", "not a file")]
)
def test_missing_path_is_refused(path, message):
    with pytest.raises(UserError, match=message):
        load_checkpoint(path, network())


def test_digest_follows_the_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_digest(str(path)) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(None) is file_digest(str(tmp_path / "none")) is None


def test_a_large_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    from marginclip.experiment import checkpoints

    monkeypatch.setattr(checkpoints, "LARGE", 2)
    read, content_of = [], checkpoints._content_digest
    monkeypatch.setattr(checkpoints, "_content_digest", lambda path: read.append(path) or content_of(path))
    path = tmp_path / "large.bin"
    path.write_bytes(b"abc")
    first = [file_digest(str(path)) for _ in range(3)]
    assert len(set(first)) == len(read) == 1
    path.write_bytes(b"abcd")
    assert file_digest(str(path)) not in first


def test_another_number_of_classes_is_said(tmp_path):
    torch.save(ResNet(4, blocks=(1, 1), width=2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"has 4 classes and the data set 3: dataset\.root needs one sub-folder for each class"):
        load_checkpoint(str(tmp_path / "model.pt"), network())


def test_a_checkpoint_without_counters_of_batches_loads(tmp_path):
    """As of torch before 0.4.1; torch itself ignores them, too."""
    torch.manual_seed(0)
    wanted, model = (ResNet(3, blocks=(1, 1), width=4) for _ in range(2))
    state = {name: value for name, value in wanted.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "old.safetensors")
    load_checkpoint(str(tmp_path / "old.safetensors"), model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_graph_is_no_checkpoint(tmp_path, suffix):
    (tmp_path / f"graph{suffix}").write_bytes(b"graph")
    with pytest.raises(UserError, match="is a graph without the network's code: give the weights that it was made from"):
        load_checkpoint(str(tmp_path / f"graph{suffix}"), ResNet(3, blocks=(1, 1), width=4))
