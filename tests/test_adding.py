"""The pages about adding things: the files they show are written to a folder, and the commands they give are run in it."""

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    "attack": "adding-an-attack.md",
    "dataset": "adding-a-dataset.md",
    "model": "adding-a-model.md",
    "defense": "adding-a-defense.md",
}
ALWAYS = ["trainer=exact", "training.epochs=1", "clean_per_class=4", "figures=false", "logger=none", "attack.min_success=0"]
SMALL = {
    "dataset": ["dataset=digits"],
    "model": ["model.width=4"],
    "defense": ["defense=static_clip", "defense.detector.folds=0"],
}
TESTS = {"test_stripes.py", "test_bands.py", "test_plain.py", "test_hush.py"}
ROWS = {"none", "static_clip", "static_clip_mmdf", "static_clip_mmdf_repaired", "static_clip_mmdf_both"}


def written(page, folder):
    """Write every block that has a title to its file below ``folder``; returns the lines of the page's commands."""
    text = (ROOT / "docs" / page).read_text()
    for title, content in re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', text, flags=re.S):
        (folder / title).parent.mkdir(parents=True, exist_ok=True)
        (folder / title).write_text(content)
    (block,) = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    return block.splitlines()


@pytest.fixture
def run(program, tmp_path):
    """Runs a command of a page in the test's folder, with this checkout."""

    def run(line, *further):
        done = program(["-m", *shlex.split(line.removeprefix("python -m ")), *further], cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture
def record_of(run, tmp_path):
    """The record of the run that the page about ``kind`` gives, made small wherever the page does not choose itself."""

    def record_of(kind):
        command = written(PAGES[kind], tmp_path)[1]
        run(command, *ALWAYS, *(option for group, options in SMALL.items() if group != kind for option in options))
        (path,) = tmp_path.glob("runs/*/run.json")
        return json.loads(path.read_text())

    return record_of


def test_the_tests_of_the_pages_pass_in_one_package(run, tmp_path):
    for page in PAGES.values():
        assert written(page, tmp_path)[0] == "python -m pytest"
    assert {path.name for path in (tmp_path / "tests").glob("test_*.py")} == TESTS
    run("python -m pytest")


def test_the_attack_runs(record_of):
    record = record_of("attack")
    assert record["status"] == "done"
    assert record["config"]["attack"]["_target_"] == "my_package.stripes.Stripes"
    assert record["identity"]["attack"]["name"] == "stripes"
    assert record["rows"].keys() == ROWS


def test_the_data_set_runs_and_is_told_by_what_changes_its_images(record_of):
    record = record_of("dataset")
    assert record["status"] == "done"
    assert record["classes"] == ["first", "second", "third", "last"]
    assert record["config"]["dataset"]["verbose"] is False
    assert record["identity"]["dataset"].keys() == {"name", "_target_", "per_class", "held_out_share", "augment"}


def test_the_model_runs(record_of):
    record = record_of("model")
    assert record["status"] == "done"
    assert record["identity"]["model"] == {"name": "plain", "_target_": "my_package.plain.Plain", "channels": 32}
    assert record["rows"].keys() == ROWS


def test_the_defense_runs(record_of):
    record = record_of("defense")
    assert record["status"] == "done"
    assert record["rows"] == {"none": {"label": "no defense", "phases": []}, "hush": {"label": "hush", "phases": ["repair"]}}
    assert record["repaired_row"] == "hush"
    assert record["clean_set_size"] == 40
    assert 0 <= record["findings"]["loudest"] < 10
