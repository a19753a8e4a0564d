"""Files that somebody made to do harm, or by mistake: each is refused by name, in bounded time and memory, and nothing in them runs."""

import json
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from marginclip.errors import UserError
from marginclip.experiment.checkpoints import load_checkpoint
from marginclip.models import ResNet

NAMES = ("model.pt", "model.pth", "model.ckpt", "model.pkl", "model.safetensors")


def network():
    torch.manual_seed(0)
    return ResNet(3, blocks=(1,), width=2)


class Runs:
    """Pickles into a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refused(path):
    """The sentence with which the file is refused."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(str(path), network())
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_code_runs_under_no_name(tmp_path, name, protocol):
    mark = tmp_path / "executed"
    for payload in (
        Runs(exec, f"open({str(mark)!r}, 'w')"),
        Runs(eval, f"open({str(mark)!r}, 'w')"),
        Runs(open, str(mark), "w"),
    ):
        content = {"state_dict": network().state_dict(), "hook": payload}
        for write in (
            lambda content=content: torch.save(content, tmp_path / name, pickle_protocol=max(protocol, 2)),
            lambda content=content: torch.save(content, tmp_path / name, _use_new_zipfile_serialization=False),
            lambda payload=payload: (tmp_path / name).write_bytes(pickle.dumps(payload, protocol)),
        ):
            write()
            refused(tmp_path / name)
            assert not mark.exists()


def zip_bomb(path):
    """A checkpoint whose one tensor is 1 GiB of zeros, squeezed into a megabyte."""
    torch.save({"weight": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as opened:
        parts = {entry.filename: opened.read(entry) for entry in opened.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        for name, content in parts.items():
            if not name.endswith("/data/0"):
                bomb.writestr(name, content)
                continue
            with bomb.open(name, "w", force_zip64=True) as entry:
                for _ in range(64):
                    entry.write(bytes(2**24))


def terabytes(path):
    """A safetensors header that claims eight terabytes."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2**41], "data_offsets": [0, 2**43]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def endless_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def overlapping(path):
    """Two tensors in the same bytes."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"one": entry, "two": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def stretched(path):
    """One number that claims to be a tensor of two terabytes, by strides of zero."""
    torch.save({"linear.weight": torch.zeros(1).expand(2**39)}, path)


def nested(path):
    content = {"weight": torch.zeros(1)}
    for _ in range(300):
        content = {"model": content}
    torch.save(content, path)


BOMBS = {
    "model.pt": (zip_bomb, stretched, nested),
    "model.safetensors": (terabytes, endless_header, overlapping),
}
CASES = [(name, make) for name, makers in BOMBS.items() for make in makers]
LIMITED = """
import resource, sys
import torch
from marginclip.errors import UserError
from marginclip.experiment.checkpoints import load_checkpoint
from marginclip.models import ResNet
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sys.argv[1:]:
    try:
        load_checkpoint(path, ResNet(3, blocks=(1,), width=2))
    except UserError as error:
        print("refused:", str(error).replace(chr(10), "NEWLINE"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are those of Linux")
def test_what_claims_or_holds_too_much_is_refused_in_half_a_gigabyte(tmp_path):
    """In a process that can take no more than 512 MiB beside what it starts with, and a minute of processor time."""
    paths = []
    for number, (name, make) in enumerate(CASES):
        (tmp_path / str(number)).mkdir()
        paths.append(tmp_path / str(number) / name)
        make(paths[-1])
    done = subprocess.run([sys.executable, "-c", LIMITED, *map(str, paths)], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths), done.stdout + done.stderr
    for line, path, (_, make) in zip(lines, paths, CASES, strict=True):
        assert line.startswith("refused:") and str(path) in line and "NEWLINE" not in line, (make.__name__, line)


def whole(state, kind):
    return {name: value.to(kind) for name, value in state.items()}


ODD = {
    "int8": lambda state: whole(state, torch.int8),
    "complex": lambda state: whole(state, torch.complex64),
    "sparse": lambda state: state | {"linear.weight": state["linear.weight"].to_sparse()},
    "quantized": lambda state: (
        state | {"linear.weight": torch.quantize_per_tensor(state["linear.weight"], 0.1, 0, torch.qint8)}
    ),
    "nan": lambda state: state | {"linear.weight": state["linear.weight"] * torch.nan},
    "meta": lambda state: state | {"linear.weight": state["linear.weight"].to("meta")},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path, kind):
    torch.save(ODD[kind](network().state_dict()), tmp_path / "model.pt")
    message = refused(tmp_path / "model.pt")
    assert re.search(r"weights.* in .(linear|conv|bn|layer)", message), message


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_are_read(tmp_path, kind):
    state = network().state_dict()
    save_file(
        {name: value.to(kind) if value.is_floating_point() else value for name, value in state.items()},
        tmp_path / "m.safetensors",
    )
    model = ResNet(3, blocks=(1,), width=2)
    load_checkpoint(str(tmp_path / "m.safetensors"), model)
    assert torch.equal(model.linear.weight, state["linear.weight"].to(kind).float())


def test_very_many_tiny_tensors_are_refused_soon(tmp_path):
    """As a million, which take a machine some seconds to write."""
    tiny = torch.zeros(1)
    torch.save(OrderedDict((f"layer{number}.weight", tiny) for number in range(20_000)), tmp_path / "model.pt")
    assert "another architecture" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("keys", [{1: torch.zeros(1)}, {("a", 1): torch.zeros(1)}, {None: torch.zeros(1), "a": torch.zeros(1)}])
def test_keys_that_are_no_words_are_refused(tmp_path, keys):
    torch.save(keys, tmp_path / "model.pt")
    refused(tmp_path / "model.pt")
