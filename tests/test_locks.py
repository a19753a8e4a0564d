"""One writer at a time in a folder, whatever host it is on; what killed ones left is removed; no lock that outlives its process."""

import errno
import multiprocessing
import os
import signal
import time

import pytest

from marginclip.errors import UserError
from marginclip.files import partial_of, remove_left_folders, write_whole
from marginclip.locks import locked

FORK = multiprocessing.get_context("fork")


def hold(folder, ready):
    with locked(folder):
        ready.set()
        time.sleep(60)


def append(folder, word):
    """Read, wait and write, which loses words where two do it at once."""
    with locked(folder):
        file = folder / "words.txt"
        before = file.read_text() if file.exists() else ""
        time.sleep(0.05)
        write_whole(file, lambda partial: partial.write_text(f"{before}{word}\n"))


def test_two_processes_take_turns(tmp_path):
    writers = [FORK.Process(target=append, args=(tmp_path / "new" / "run", number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert sorted((tmp_path / "new" / "run" / "words.txt").read_text().split()) == ["0", "1", "2", "3"]


def test_a_lock_ends_with_the_process_that_is_killed(tmp_path):
    ready = FORK.Event()
    holder = FORK.Process(target=hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    with locked(tmp_path):
        pass


@pytest.fixture
def of_killed(monkeypatch):
    """Names of temporary files as a process gave them that is gone."""
    process = FORK.Process(target=os.getpid)
    process.start()
    process.join(60)

    def name(path):
        with monkeypatch.context() as changed:
            changed.setattr("os.getpid", lambda: process.pid)
            return partial_of(path)

    return name


def test_folders_that_a_killed_dashboard_left_are_removed(tmp_path, of_killed):
    target = tmp_path / "site[1]"
    left, mine, other = of_killed(target), partial_of(target), of_killed(tmp_path / "photos")
    kept = [mine, other, tmp_path / ".site[1].partial", tmp_path / ".site[1].4194304.partial"]
    for folder in (left, *kept):
        folder.mkdir()
        (folder / "index.html").write_text("half of")
    remove_left_folders(target)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_what_killed_processes_left_is_removed(tmp_path, of_killed):
    left = [of_killed(tmp_path / place) for place in ("model.safetensors", "checkpoint/last.ckpt", "figures/margins.png")]
    kept = [tmp_path / "notes.partial", tmp_path / ".hidden", tmp_path / "model.safetensors", tmp_path / ".download.partial"]
    kept += [tmp_path / ".site.4194304.partial", tmp_path / "checkpoint" / ".last.ckpt.partial"]
    kept += [tmp_path / "photos" / ".download.partial", of_killed(tmp_path / "photos" / "rows.csv")]
    for path in left + kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half of")
    with locked(tmp_path):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)


def test_a_file_of_a_living_process_is_left_alone(tmp_path):
    """Such as the rows of a scan into the folder of the artefact, which takes no lock."""

    def slow(partial):
        partial.write_text("rows")
        with locked(tmp_path):
            pass

    assert write_whole(tmp_path / "rows.csv", slow).read_text() == "rows"


@pytest.mark.parametrize(("age", "kept"), [(3600, True), (8 * 24 * 3600, False)])
def test_a_file_of_another_host_is_removed_when_it_is_old(tmp_path, monkeypatch, of_killed, age, kept):
    with monkeypatch.context() as changed:
        changed.setattr("platform.node", lambda: "far-away")
        path = of_killed(tmp_path / "run.json")
    path.write_text("half of")
    os.utime(path, (time.time() - age,) * 2)
    with locked(tmp_path):
        assert path.exists() == kept


def test_hosts_whose_names_begin_alike_are_told_apart(tmp_path, monkeypatch, of_killed):
    names = "marginclip-sweep-worker-1", "marginclip-sweep-worker-2"
    monkeypatch.setattr("platform.node", lambda: names[0])
    path = of_killed(tmp_path / "run.json")
    path.write_text("half of")
    monkeypatch.setattr("platform.node", lambda: names[1])
    with locked(tmp_path):
        assert path.exists()


def test_a_folder_with_the_name_of_a_temporary_file_stops_nobody(tmp_path, of_killed):
    for folder in (tmp_path / ".site.99.partial", of_killed(tmp_path / "site")):
        folder.mkdir()
    with locked(tmp_path):
        pass


def test_partial_files_of_two_hosts_differ(tmp_path, monkeypatch):
    """Of the same process number; and where the host names are the same, too, as in containers."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    names = set()
    for host in ("node1", "node2", "node2"):
        monkeypatch.setattr("platform.node", lambda host=host: host)
        names.add(partial_of(tmp_path / "run.json"))
    assert len(names) == 3
    assert all(name.parent == tmp_path and name.name.endswith(".partial") for name in names)
    path = tmp_path / "run.json"

    def interrupted_by_the_other(partial):
        partial.write_text("first")
        write_whole(path, lambda other: other.write_text("second"))
        assert partial.read_text() == "first"

    write_whole(path, interrupted_by_the_other)
    assert path.read_text() == "first"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def missing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.raises(UserError, match="is on a file system without file locks"), locked(tmp_path):
        pytest.fail("the lock was taken")


def test_a_folder_that_cannot_be_written_is_told_as_such(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.open", read_only)
    with pytest.raises(OSError, match="Read-only"), locked(tmp_path):
        pytest.fail("the lock was taken")
