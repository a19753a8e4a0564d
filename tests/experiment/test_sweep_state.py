"""The state of a sweep from the files of its jobs, and `marginclip status`."""

import json
import os
import time

import pytest

from marginclip.cli import main as marginclip
from marginclip.experiment.progress import Display, task
from marginclip.experiment.signs_of_life import alive
from marginclip.experiment.status import main
from marginclip.experiment.sweep_display import SweepWatch, display_of
from marginclip.experiment.sweep_state import sweep_state
from marginclip.sweep_files import ALIVE, STALE, is_alive, sign_of


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def sign(overrides, ago):
    now = time.time()
    return {
        "overrides": overrides,
        "host": "node7",
        "pid": 41,
        "started": now - 600,
        "seen": now - ago,
        "doing": "MMAC: 3 of 9",
    }


@pytest.fixture
def sweep(tmp_path):
    """One done, one failed, one running, one killed, one not begun; a trained victim."""
    folder = tmp_path / "runs" / "sweeps" / "2026-01-02" / "03-04-05-678"
    write(folder, "sweep.json", {"asked": [f"seed={number}" for number in range(5)]})
    write(folder / "0", "outcome.json", {"overrides": "seed=0", "error": None, "record": "runs/a/run.json"})
    write(folder / "1", "outcome.json", {"overrides": "seed=1", "error": "attack.rate must be in (0, 1]", "record": None})
    write(folder / "2", ALIVE, sign("seed=2", 5))
    write(folder / "3", ALIVE, sign("seed=3", 2 * STALE))
    write(folder / "victims", "sweep.json", {"asked": ["seed=0"]})
    write(
        folder / "victims" / "0", "outcome.json", {"overrides": "seed=0", "error": None, "record": "runs/victims/v/victim.json"}
    )
    return folder


def test_every_cell_has_a_state_and_a_reason(sweep):
    state = sweep_state(sweep)
    assert [cell.state for cell in state.cells] == ["done", "failed", "running", "killed", "missing"]
    assert [cell.overrides for cell in state.cells] == [f"seed={number}" for number in range(5)]
    why = [cell.why for cell in state.cells]
    assert why[1] == "attack.rate must be in (0, 1]"
    assert why[2] == "process 41 on node7 for 10 min: MMAC: 3 of 9"
    assert why[3] == f"process 41 on node7, no sign of life for {2 * STALE / 60:.0f} min"
    assert why[4] == "not begun"
    assert [cell.state for cell in state.victims] == ["done"]
    assert state.sentence(60) == "1 of 5 cells done, 1 failed, 1 running, 1 killed, 1 left, about 2 min left"


def test_a_sweep_that_is_watched(sweep, capsys):
    os.utime(sweep / "sweep.json", (time.time() - 60, time.time() - 60))
    watch = SweepWatch(sweep)
    assert watch.line().startswith("1 of 5 cells done, 1 failed")
    table = watch.table()
    row = {column.header: next(iter(column.cells)) for column in table.columns}
    assert row == {
        "victims": "1/1", "cells": "5", "done": "1", "failed": "1", "running": "1", "left": "2", "time left": "2 min"
    }  # fmt: skip
    assert str(display_of(sweep, bars=False)).startswith("1 of 5")


def test_status_names_what_is_not_done_and_why(sweep, finished, capsys):
    runs_dir = sweep.parents[2]
    assert main([str(runs_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sweep 2026-01-02/03-04-05-678: 1 of 5 cells done, 1 failed, 1 running, 1 killed, 1 left"
    assert [line.split(":")[0].strip() for line in lines[1:5]] == ["failed", "running", "killed", "missing"]
    assert lines[5] == "runs: none; 0 victims trained"


def test_what_a_later_sweep_did_is_done(sweep, capsys):
    later = sweep.with_name("04-00-00-000")
    write(later, "sweep.json", {"asked": ["seed=4", "seed=1"]})
    write(later / "0", "outcome.json", {"overrides": "seed=4", "error": None, "record": "runs/b/run.json"})
    main([str(sweep.parents[2])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 of 5 cells done, 1 failed, 1 running, 1 killed")
    assert "seed=4" not in "".join(lines)
    assert lines[-2] == "  missing: seed=1: not begun"


@pytest.mark.parametrize(("name", "command"), [("02-00-00-000", "defend"), ("04-00-00-000", "train")])
def test_what_an_earlier_sweep_or_another_command_did_is_not(sweep, capsys, name, command):
    """With the same options: `marginclip train` trains victims, and leaves the runs of `defend` to do."""
    other = sweep.with_name(name)
    write(other, "sweep.json", {"command": command, "asked": ["seed=4"]})
    write(other / "0", "outcome.json", {"overrides": "seed=4", "error": None, "record": "runs/b/run.json"})
    main([str(sweep.parents[2])])
    assert "  missing: seed=4: not begun" in capsys.readouterr().out.splitlines()


def test_what_a_killed_job_left_goes_when_the_same_is_done(tmp_path):
    for name, overrides, ago in (("a", "seed=1", 2 * STALE), ("b", "seed=2", 2 * STALE), ("c", "seed=1", 5)):
        write(tmp_path / "day" / name, ALIVE, sign(overrides, ago))
    with pytest.raises(ValueError), alive(tmp_path / "day" / "d", "seed=1"):
        raise ValueError
    assert len(list(tmp_path.rglob(ALIVE))) == 3
    with alive(tmp_path / "day" / "d", "seed=1"):
        pass
    assert sorted(path.parent.name for path in tmp_path.rglob(ALIVE)) == ["b", "c"]


def test_status_counts_records(finished, capsys):
    runs_dir, record = finished
    main([str(runs_dir)])
    assert capsys.readouterr().out.splitlines()[0] == f"runs: 1 {record.status}; 1 victims trained"


def test_status_of_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        marginclip(["status", str(tmp_path / "nowhere")])
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: there is no folder '{tmp_path / 'nowhere'}'\n"


def test_a_job_gives_signs_of_life_while_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("marginclip.experiment.progress._process.display", Display(lambda: "1 of 2 cells done"))
    with task("MMAC", 9), alive(tmp_path, "seed=0", every=0.01):
        for _ in range(500):
            if (found := sign_of(tmp_path)) is not None:
                break
            time.sleep(0.01)
        assert is_alive(found)
        first = found["seen"]
        for _ in range(500):
            if sign_of(tmp_path)["seen"] > first:
                break
            time.sleep(0.01)
        assert sign_of(tmp_path)["seen"] > first
        assert (found["overrides"], found["pid"]) == ("seed=0", os.getpid())
        assert found["doing"] == "MMAC: 0 of 9 steps", "the sweep that it is of is told once, elsewhere"
    assert sign_of(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
