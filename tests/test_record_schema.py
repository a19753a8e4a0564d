"""The record of a run: what is written reads back, what is not as the schema says is refused, and the document is up to date."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from marginclip.errors import UserError
from marginclip.record import (
    DetectionTest,
    Device,
    Flagged,
    Row,
    RunRecord,
    VictimSource,
    find_records,
    json_schema,
    read_record,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "record.md"
CONFIG = {"attack": {"name": "badnet", "target": None}, "x2x": None, "model": {"width": 16}, "seed": 3}


def full(folder: Path) -> RunRecord:
    """A record in which every field is set."""
    return RunRecord(
        status="done",
        error="an earlier reason",
        config=CONFIG,
        identity={"seed": 3},
        seed=3,
        versions={"python": "3.11.9"},
        device=Device(name="x86_64", accelerator="cpu", threads=1),
        precision="32-true",
        seconds={"victim": 1.25, "repair": 1 / 3},
        peak_memory_mib={"process": 812.5},
        victim=VictimSource(folder="victims/a", trained_now=True),
        detection=DetectionTest(
            test="mmbd", statistics=[1.0, 2.5e-17], p_value=0.1, uncalibrated_p_value=0.2, alpha=0.05, detected=False,
            suspect=0, true_target=None, shape=2.0, scale=0.1,
        ),
        detector={"threshold": None, "folds": 5},
        flagged=Flagged(images=100, flagged=7),
        rows={"none": Row(label="no defense"), "mmac": Row(label="MMAC", phases=["repair"])},
        repaired_row="mmac",
        metrics={"none": {"acc": 0.1 + 0.2, "asr": None}},
        per_class={"none": [0.5, None]},
        classes=["cat", "dog"],
        training_counts=[500, 5],
        clean_set_size=100,
        evaluated_on="held_out",
        needed_asr=0.9,
        history=[{"lambda": 0.1}],
        findings={"suspects": [1], "reason": None},
    ).at(folder)  # fmt: skip


def changed(folder: Path, **changes: object) -> Path:
    """Writes a full record, then changes entries of its file (`...` removes one); returns the file."""
    path = full(folder).write()
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return path


def refusal(folder: Path) -> str:
    """What reading the record in ``folder`` is refused with."""
    with pytest.raises(UserError) as refused:
        read_record(folder)
    return str(refused.value)


def test_every_field_reads_back_equal(tmp_path: Path) -> None:
    record = full(tmp_path / "run")
    assert record.model_fields_set == set(RunRecord.model_fields) - {"schema_version"}
    assert record.write() == record.path == tmp_path / "run" / "run.json"
    found = read_record(tmp_path / "run")
    assert found == record
    assert found.folder == tmp_path / "run"


def test_a_new_record_reads_back_equal_and_its_file_holds_no_empty_entries(tmp_path: Path) -> None:
    record = RunRecord(config=CONFIG, seed=3).at(tmp_path)
    content = json.loads(record.write().read_text())
    assert read_record(tmp_path) == record
    assert content["schema_version"] == 2
    assert None not in content.values()


def test_nulls_inside_the_configuration_and_the_metrics_are_kept(tmp_path: Path) -> None:
    content = json.loads(full(tmp_path).write().read_text())
    assert content["config"] == CONFIG
    assert content["metrics"]["none"]["asr"] is None
    found = read_record(tmp_path)
    assert (found.config, found.metrics, found.findings["reason"]) == (CONFIG, {"none": {"acc": 0.1 + 0.2, "asr": None}}, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"relaxed": 0.0}, "relaxed: Extra inputs are not permitted"),
        ({"rows": {"none": {"label": "no defense", "colour": "red"}}}, "rows.none.colour: Extra inputs are not permitted"),
        ({"seed": ...}, "seed: Field required"),
        ({"device": {"name": "x86_64", "threads": 1}}, "device.accelerator: Field required"),
        ({"seed": "3"}, "seed: Input should be a valid integer"),
        ({"metrics": {"none": {"acc": "high"}}}, "metrics.none.acc: Input should be a valid number"),
        ({"status": "over"}, "status: Input should be 'running', 'done', 'attack_failed' or 'failed'"),
    ],
)
def test_what_is_not_as_the_schema_says_is_refused(changes: dict, said: str, tmp_path: Path) -> None:
    path = changed(tmp_path, **changes)
    assert refusal(tmp_path) == f"'{path}' is not as its schema says: {said}"


@pytest.mark.parametrize(("version", "named"), [(..., 1), (1, 1), (3, 3), ("2", "2")])
def test_a_record_of_another_schema_is_refused_by_name(version: object, named: object, tmp_path: Path) -> None:
    path = changed(tmp_path, schema_version=version)
    assert refusal(tmp_path).startswith(
        f"'{path}' is a record of schema {named}, and this version of marginclip reads schema 2"
    )


@pytest.mark.parametrize("content", [b'{"config": {', b"", b"\xff\xfe\x00"])
def test_a_broken_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    assert refusal(tmp_path).startswith(f"'{tmp_path / 'run.json'}' cannot be read (")


@pytest.mark.parametrize("content", ["[1]", "null", '{"a": 1}', '{"config": 5}'])
def test_a_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    assert refusal(tmp_path) == f"'{tmp_path / 'run.json'}' is not the record of a run (no 'config')"


def test_no_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"there is no '{tmp_path / 'run.json'}'"


def test_records_are_found_at_any_depth_in_the_order_of_their_paths(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "deep", tmp_path / "b", tmp_path / "c"]
    for folder in reversed(folders):
        full(folder).write()
    assert list(find_records(tmp_path)) == folders


def test_a_record_without_a_place_has_no_path() -> None:
    with pytest.raises(ValueError, match="neither read from a folder nor written to one"):
        _ = RunRecord(config=CONFIG, seed=3).path


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.width", 16), ("attack.target", None), ("x2x.name", None), ("model.width.more", None), ("nothing", None)],
)
def test_settings_are_read_by_dotted_key(key: str, value: object, tmp_path: Path) -> None:
    assert full(tmp_path).setting(key) == value


def test_choices_and_classes_have_names(tmp_path: Path) -> None:
    record = full(tmp_path)
    assert [record.choice(group) for group in ("attack", "x2x", "model")] == ["badnet", None, None]
    assert [record.class_name(number) for number in (0, 1, 2, -1)] == ["cat", "dog", "2", "-1"]


def test_the_document_holds_the_schema_and_names_every_field() -> None:
    text = DOCUMENT.read_text()
    (block,) = re.findall(r"```json\n(.*?)```", text, flags=re.S)
    assert json.loads(block) == json_schema(), "docs/record.md is out of date: put in what `python -m marginclip.record` prints"
    assert re.findall(r"^\| `(\w+)` \|", text, flags=re.M) == list(RunRecord.model_fields)


def test_the_module_prints_the_schema() -> None:
    done = subprocess.run([sys.executable, "-m", "marginclip.record"], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == json_schema()
