"""Files appear whole or not at all."""

import errno
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from marginclip.files import read_json, write_all_whole, write_json, write_tensors, write_whole


def full_disk(path):
    path.write_text("half of")
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(path):
    path.write_text("half of")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("write", "error"), [(full_disk, OSError), (interrupted, KeyboardInterrupt)])
@pytest.mark.parametrize("old", ["old", None])
def test_a_failed_write_leaves_what_was_there(write, error, old, tmp_path):
    path = tmp_path / "result.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error):
        write_whole(path, write)
    assert (path.read_text() if path.exists() else None) == old
    assert list(tmp_path.iterdir()) == ([path] if old else [])


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "deep" / "result.txt"

    def write(partial):
        assert not path.exists() or path.read_text() == "old"
        partial.write_text(text)

    for text in ("old", "new"):
        assert write_whole(path, write) == path
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_json_survives_and_keeps_its_order(tmp_path):
    content = {"b": [1, 2.5, None], "a": {"c": "ä"}}
    assert read_json(write_json(tmp_path / "a.json", content)) == content
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"]
    assert read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize("content", [{"asr": float("nan")}, {"x": object()}])
def test_json_that_others_could_not_read_is_not_written(content, tmp_path):
    write_json(tmp_path / "a.json", {"asr": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text()) == {"asr": 1}


def test_tensors_of_any_layout_survive(tmp_path):
    shared = torch.rand(4, 3)
    tensors = {
        "plain": torch.rand(2, 3),
        "channels last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "transposed": torch.rand(2, 3).T,
        "learned": torch.nn.Parameter(torch.rand(2)),
        "infinite": torch.tensor([float("inf")]),
        "empty": torch.zeros(0, 3),
        "one": shared,
        "same": shared,
        "view": shared[1:],
    }
    write_tensors(tmp_path / "t.safetensors", tensors, metadata={"kind": "test"})
    restored = load_file(tmp_path / "t.safetensors")
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], value) for name, value in tensors.items())
    with safe_open(tmp_path / "t.safetensors", "pt") as opened:
        assert opened.metadata() == {"kind": "test"}


@pytest.mark.parametrize("fails", [0, 1])
def test_files_that_belong_together_stay_together_when_the_disk_is_full(fails, tmp_path):
    paths = [tmp_path / "tensors", tmp_path / "description"]
    for path in paths:
        path.write_text("old")
    writes = [lambda partial: partial.write_text("new"), lambda partial: partial.write_text("new")]
    writes[fails] = full_disk
    with pytest.raises(OSError, match="No space"):
        write_all_whole(dict(zip(paths, writes, strict=True)))
    assert [path.read_text() for path in paths] == ["old", "old"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_what_was_there_outlives_a_failure_of_every_step(step, error, tmp_path, monkeypatch):
    write_json(tmp_path / "run.json", {"status": "done"})

    def fail(*_):
        raise OSError(error, "the disk says no")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="the disk says no"):
        write_json(tmp_path / "run.json", {"status": "failed"})
    assert read_json(tmp_path / "run.json") == {"status": "done"}
    assert list(tmp_path.iterdir()) == [tmp_path / "run.json"]
