"""The entry points as a user starts them: as a program of its own, with nobody there to answer a prompt."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "dataset=digits", "trainer=exact", "training.epochs=1", "model.width=4", "clean_per_class=4",
    "figures=false", "defense=static_clip", "defense.detector.folds=0",
]  # fmt: skip


@pytest.fixture
def command(tmp_path, program):
    """Runs ``python SCRIPT.py ARGUMENTS`` in an empty folder, without any W&B login and with the standard input closed."""

    def command(script, *arguments):
        hidden = ("WANDB_", "NETRC")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        given = environment | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        return program([str(ROOT / f"{script}.py"), *arguments], cwd=tmp_path, env=given)

    return command


def test_defend_prints_its_table_and_its_record_last(command, tmp_path):
    done = command("defend", *SMALL, "logger=none", "runs_dir=out", "attack.min_success=0")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert "ACC %" in "\n".join(table)
    record = json.loads((tmp_path / last).read_text())
    assert (record["status"], list(record["metrics"])) == (
        "done",
        ["none", "static_clip", "static_clip_mmdf", "static_clip_mmdf_repaired", "static_clip_mmdf_both"],
    )
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["out"]
    assert "Traceback" not in done.stderr


def test_wandb_without_a_key_logs_offline_and_asks_and_warns_of_nothing(command, tmp_path):
    """The default logger, in a sweep of one cell, whose offline runs lie where the page says that they are uploaded from."""
    done = command("defend", "-m", *SMALL, "attack=none")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/digits*/wandb/offline-run-*/*.wandb"))
    told = (done.stdout + done.stderr).lower()
    assert [word for word in ("traceback", "wandb", "weights & biases", "anonymous", "warning") if word in told] == []
    recipe = re.findall(r"^wandb sync (\S+)", (ROOT / "docs" / "wandb.md").read_text(), flags=re.M)
    assert len(recipe) == 3
    assert [len(list(tmp_path.glob(pattern))) for pattern in recipe] == [1, 1, 1], "a repair, a training, a sweep"


def test_sweep_survives_a_failing_cell_and_names_it(command, tmp_path):
    done = command("defend", "-m", *SMALL, "logger=none", "runs_dir=out", "attack.min_success=0", "x2x.target=10,3")
    assert done.returncode == 1
    assert "1 of 2 runs done" in done.stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert "x2x.target=10" in failed[0]
    assert failed[0].endswith("x2x.target must be a class in 0..9, got 10")
    statuses = {json.loads(path.read_text())["status"] for path in tmp_path.glob("out/digits*/run.json")}
    assert statuses == {"failed", "done"}
    assert "Traceback" not in done.stdout + done.stderr
    (noted,) = tmp_path.glob("out/sweeps/*/*/sweep.json")
    outcomes = [json.loads((noted.parent / number / "outcome.json").read_text()) for number in "01"]
    assert json.loads(noted.read_text()) == {"command": "defend", "asked": [outcome["overrides"] for outcome in outcomes]}


def test_train_prints_its_record_last(command, tmp_path):
    done = command("train", *SMALL[:5], "logger=none", "runs_dir=out", "attack.min_success=0")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / done.stdout.splitlines()[-1]).read_text())
    assert set(record["metrics"]) == {"acc", "asr", "pacc"}


@pytest.mark.parametrize("script", ["train", "defend"])
def test_a_mistake_is_one_sentence_at_once(command, tmp_path, script):
    done = command(script, "attack=badnett")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "error: unknown option attack=badnett; did you mean 'badnet'?" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_help_lists_the_groups(command):
    done = command("defend", "--help")
    assert done.returncode == 0
    listed = (
        "adaptive, badnet, blend, blend_full, chessboard, clean_label, input_aware, input_aware_small, low_frequency, none, one_pixel, "
        "sinusoid, wanet"
    )
    assert f"attack: {listed}" in done.stdout
