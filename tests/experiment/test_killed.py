"""A run that is killed at any point goes on when it is started again, and ends in the same bits as one that was never killed."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

CLOCKS = {"config", "seconds", "peak_memory_mib", "victim"}  # with the name of runs_dir, times, and who trained the victim


def contents(runs_dir):
    """What every file below holds: records without their clocks, digests of all others."""
    found = {}
    for path in sorted(runs_dir.rglob("*")):
        if path.is_dir() or path.name == ".lock":
            continue
        name = str(path.relative_to(runs_dir))
        if path.suffix == ".json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in CLOCKS}
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_was_not(tmp_path):
    """Before steps of its writing, with a file half written, and at random times; nothing half written is left, and no checkpoint."""
    program = Path(__file__).with_name("attempts.py")
    done = subprocess.run([sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    through = contents(tmp_path / "through")
    parts = {"model.safetensors", "victim.json", "bounds.safetensors", "arrays.safetensors", "run.json"}
    assert {Path(name).name for name in through} >= parts
    assert json.loads((tmp_path / "together.json").read_text()) == [0, 0], done.stderr
    assert contents(tmp_path / "together") == through, "two processes did the same run at once"
    results = [json.loads(path.read_text()) | {"name": path.stem} for path in tmp_path.glob("result-*.json")]
    assert len(results) >= 20
    for result in results:
        killed, finished = result["statuses"]
        assert killed == -9 or (result["point"][0] == "seconds" and killed == 0), result
        assert finished == 0, (result, done.stderr)
        assert contents(tmp_path / result["name"].replace("result", "killed")) == through, result
