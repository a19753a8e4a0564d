"""Weights & Biases: offline unless a key is configured, and never a prompt."""

import io
import itertools
import json
import struct
import time

import numpy as np
import pytest
from PIL import Image
from wandb.proto import wandb_internal_pb2

from marginclip.errors import UserError
from marginclip.experiment.loggers import opened_loggers
from marginclip.experiment.loggers.base import LoggedRun
from marginclip.experiment.loggers.sweep import publish_sweep, sweep_tables
from marginclip.experiment.loggers.wandb import captioned_examples, kept_arrays, tables, wandb_mode


@pytest.fixture(autouse=True)
def no_key(tmp_path, monkeypatch):
    """A machine on which nobody ever logged in."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


def test_auto_without_a_key_is_offline():
    assert wandb_mode("auto") == "offline"


def test_auto_with_a_key_in_the_environment_is_online(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"


@pytest.mark.parametrize(
    ("host", "mode"), [("api.wandb.ai", "online"), ("api.github.com", "offline"), ("wandb.example.org", "offline")]
)
def test_auto_reads_the_login_of_the_right_host(no_key, host, mode):
    netrc = no_key / ".netrc"
    netrc.write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    netrc.chmod(0o600)
    assert wandb_mode("auto") == mode


def test_auto_follows_the_base_url(no_key, monkeypatch):
    netrc = no_key / ".netrc"
    netrc.write_text("machine wandb.example.org login user password 0\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert wandb_mode("auto") == "online"


def test_unreadable_login_file_is_no_login(no_key):
    (no_key / ".netrc").write_text("machine\n\n what is this")
    assert wandb_mode("auto") == "offline"


def test_a_choice_stands():
    assert (wandb_mode("online"), wandb_mode("offline")) == ("online", "offline")
    with pytest.raises(UserError, match="auto, online or offline, got 'on'"):
        wandb_mode("on")


def test_online_without_a_key_is_refused_and_not_asked_for(configure, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted"))
    spec = configure("logger=wandb", "logger.wandb.mode=online")
    with (
        pytest.raises(UserError, match="needs a Weights & Biases API key"),
        opened_loggers(spec, tmp_path, job="defend", name="run"),
    ):
        pass


def test_runs_are_tagged_by_their_options_and_joined_by_their_victim(configure, tmp_path):
    def logged(*overrides):
        return LoggedRun(configure(*overrides), tmp_path, "defend", "run")

    run = logged("attack=chessboard", "x2x=all2all", "defense=mmac")
    assert run.labels == {
        "dataset": "digits", "model": "small_resnet", "attack": "chessboard", "x2x": "all2all", "defense": "mmac"
    }  # fmt: skip
    assert logged("attack=none").labels["attack"] == "none"
    other = logged("attack=chessboard", "x2x=all2all", "defense=static_clip")
    assert run.victim == other.victim != logged("attack=badnet").victim
    assert logged("victim=checkpoint", "victim.path=theirs.pt", "dataset=digits").victim == "theirs.pt"


def test_the_roc_curve_and_the_classes_become_tables(finished):
    _, record = finished
    found = {name: (columns, rows) for name, columns, rows in tables(record, kept_arrays(record.folder))}
    assert set(found) == {"results", "per_class", "roc/detector"}
    columns, rows = found["results"]
    assert {row[0]: row[columns.index("asr")] for row in rows} == {row: each["asr"] for row, each in record.metrics.items()}
    columns, rows = found["per_class"]
    assert columns[0] == "class"
    assert [row[0] for row in rows] == record.classes
    columns, rows = found["roc/detector"]
    assert columns == ["threshold", "fpr", "tpr"]
    for earlier, later in itertools.pairwise(rows):
        assert earlier[0] > later[0]
        assert earlier[1] <= later[1]
        assert earlier[2] <= later[2]
    assert rows[-1][1:] == [1, 1]


def test_examples_have_their_trigger_beside_them(finished):
    _, record = finished
    arrays = kept_arrays(record.folder)
    examples = captioned_examples(record, arrays)
    image, caption = examples[1]
    width = arrays["examples/clean"].shape[3]
    assert image.shape[:2] == (width, 2 * width)
    for half, kind in ((image[:, :width], "clean"), (image[:, width:], "triggered")):
        kept = arrays[f"examples/{kind}"][1].permute(1, 2, 0).squeeze(-1)
        assert np.abs(half / 255 - kept.numpy()).max() < 0.003
    assert (
        caption == f"{record.classes[int(arrays['examples/labels'][1])]} → {record.classes[int(arrays['examples/targets'][1])]}"
    )


def one_pixel():
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


def wandb_records(file):
    """The records of a ``.wandb`` file, read by the format of LevelDB's logs: blocks of 32 KiB, records in one or several parts."""
    content, parts = file.read_bytes(), b""
    place = 7  # a header of W&B's own
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_back(folder):
    """The only offline run below ``folder``: the run, what was logged by key (parts joined by /), the last summary, the exit status."""
    (file,) = folder.rglob("*.wandb")
    for _ in range(100):  # its own process writes it
        if any(record.WhichOneof("record_type") == "exit" for record in wandb_records(file)):
            break
        time.sleep(0.1)
    run, logged, summary, exit_code = None, {}, {}, None
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        elif kind == "history":
            logged |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        elif kind == "summary":
            summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return run, logged, summary, exit_code


def kept(folder, path):
    """A file that an offline run keeps to be uploaded, by the path that it logged."""
    (found,) = folder.rglob(f"files/{path}")
    return found


def table_of(folder, logged, name):
    """The columns and rows of a table that an offline run logged."""
    content = json.loads(kept(folder, logged[f"{name}/path"]).read_text())
    return content["columns"], content["data"]


def test_an_offline_run_read_back_has_group_tags_tables_and_images(finished, configure, tmp_path, capfd):
    _, record = finished
    spec = configure("logger=wandb", "logger.wandb.group=2026/sweep")
    (tmp_path / "figure.png").write_bytes(one_pixel())
    with opened_loggers(spec, tmp_path / "run", job="defend", name="the run") as loggers:
        loggers.publish(record, [tmp_path / "figure.png"])
    run, logged, summary, exit_code = read_back(tmp_path / "run")
    assert (run.run_group, run.job_type, run.display_name, exit_code) == ("2026/sweep", "defend", "the run", 0)
    assert {"attack=badnet", "defense=mmdf", "dataset=digits", "x2x=all2one", f"status={record.status}"} <= {*run.tags}
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["victim_name"] == LoggedRun(spec, tmp_path, "defend", "").victim
    kinds = {name.removesuffix("/_type"): value for name, value in logged.items() if name.endswith("/_type")}
    assert {name for name, kind in kinds.items() if kind == "table-file"} == {"results", "per_class", "roc/detector"}
    assert (kinds["examples"], kinds["figures/figure"]) == ("images/separated", "image-file")
    columns, rows = table_of(tmp_path / "run", logged, "results")
    assert {row[0]: row[columns.index("asr")] for row in rows} == {row: each["asr"] for row, each in record.metrics.items()}
    assert table_of(tmp_path / "run", logged, "roc/detector")[0] == ["threshold", "fpr", "tpr"]
    assert [row[0] for row in table_of(tmp_path / "run", logged, "per_class")[1]] == record.classes
    images = [kept(tmp_path / "run", path) for path in logged["examples/filenames"]]
    assert len(images) == len(kept_arrays(record.folder)["examples/labels"])
    with Image.open(images[0]) as image:
        assert image.width == 2 * image.height
    assert summary["mmac/asr"] == summary["repaired/asr"] == record.metrics["mmac"]["asr"]
    assert summary["detector/auroc"] == record.metrics["mmdf"]["auroc"]
    assert "WARNING" not in "".join(capfd.readouterr())


def test_a_failed_run_is_marked(configure, tmp_path):
    def fail():
        with opened_loggers(configure("logger=wandb"), tmp_path, job="defend", name="run") as loggers:
            loggers.destinations[0].lightning.log_metrics({"loss": 1.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    run, _, _, exit_code = read_back(tmp_path)
    assert "status=failed" in run.tags
    assert exit_code == 1


def test_a_sweep_has_a_run_of_its_own_with_the_pivot(finished, configure, tmp_path):
    _, record = finished
    outcomes = [{"record": str(record.path)}, {"record": None}, {"record": str(tmp_path / "victim.json")}]
    publish_sweep(configure("logger=wandb", "logger.wandb.group=a/b").logger, tmp_path, outcomes)
    run, logged, _, _ = read_back(tmp_path)
    assert (run.run_group, run.job_type, run.display_name) == ("a/b", "sweep", "sweep a/b")
    for name, fixed in (("pivot", ["badnet", "mmdf", 1]), ("runs", ["badnet", "mmdf", record.status])):
        columns, rows = table_of(tmp_path, logged, name)
        assert len(rows) == 1
        cell = dict(zip(columns, rows[0], strict=True))
        assert [cell["attack"], cell["defense"], cell["runs" if name == "pivot" else "status"]] == fixed
        assert cell["repaired/asr"] == record.metrics["mmac"]["asr"]


def test_what_a_sweep_varied_beside_its_groups_is_a_column_and_no_part_of_a_mean(finished):
    _, record = finished
    others = [record.model_copy(deep=True) for _ in range(4)]
    for number, other in enumerate(others):
        other.seed, other.identity["seed"] = number % 2, number % 2
        other.identity["training"]["epochs"] = 1 + number // 2
        other.metrics["mmac"]["asr"] = 0.1 * number
    tables = sweep_tables(others)
    for name, count in (("pivot", 2), ("runs", 4)):
        columns, rows = tables[name]
        assert len(rows) == count
        assert {row[columns.index("training.epochs")] for row in rows} == {"1", "2"}
        assert "seed" not in columns[: columns.index("training.epochs") + 1]
    columns, rows = tables["pivot"]
    assert [row[columns.index("repaired/asr")] for row in rows] == pytest.approx([0.05, 0.25])


def test_the_pivot_is_the_mean_over_runs_whose_attack_took(finished):
    _, record = finished
    others = [record.model_copy(deep=True) for _ in range(3)]
    for other, asr in zip(others, (0.2, 0.6, 0.9), strict=True):
        other.metrics["mmac"]["asr"] = asr
    others[2].status = "attack_failed"
    found = sweep_tables(others)
    columns, rows = found["pivot"]
    assert len(rows) == 1
    cell = dict(zip(columns, rows[0], strict=True))
    assert (cell["attack"], cell["defense"], cell["runs"]) == ("badnet", "mmdf", 2)
    assert cell["repaired/asr"] == pytest.approx(0.4)
    columns, rows = found["runs"]
    assert [row[columns.index("repaired/asr")] for row in rows] == [0.2, 0.6, 0.9]
