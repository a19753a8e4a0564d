"""Weights & Biases: offline unless a key is configured, and never a prompt."""

import itertools

import pytest

from marginclip.errors import UserError
from marginclip.experiment.loggers import _tables, build_logger, run_tags, victim_name, wandb_mode


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
    with pytest.raises(UserError, match="needs a Weights & Biases API key"):
        build_logger(configure("logger=wandb", "logger.mode=online"), tmp_path, job="defend", name="run")


def test_csv_and_none(configure, tmp_path):
    assert build_logger(configure(), tmp_path, job="defend", name="run") is False
    logger = build_logger(configure("logger=csv"), tmp_path, job="defend", name="run")
    logger.log_metrics({"acc": 0.5}, step=1)
    logger.save()
    assert "0.5" in (tmp_path / "csv" / "metrics.csv").read_text()


def test_runs_are_tagged_by_their_options_and_joined_by_their_victim(configure):
    spec = configure("attack=chessboard", "x2x=all2all", "defense=mmac")
    assert run_tags(spec) == ["dataset=digits", "model=small_resnet", "attack=chessboard", "x2x=all2all", "defense=mmac"]
    assert "attack=none" in run_tags(configure("attack=none"))
    other = configure("attack=chessboard", "x2x=all2all", "defense=static_clip")
    assert victim_name(spec) == victim_name(other) != victim_name(configure("attack=badnet"))
    given = configure("victim=checkpoint", "victim.path=theirs.pt", "dataset=digits")
    assert victim_name(given) == "theirs.pt"


def test_the_roc_curve_and_the_classes_become_tables(finished):
    _, record = finished
    tables = {name: (columns, rows) for name, columns, rows in _tables(record)}
    assert set(tables) == {"per_class", "roc/mmdf"}
    columns, rows = tables["per_class"]
    assert columns[0] == "class"
    assert [row[0] for row in rows] == record.classes
    columns, rows = tables["roc/mmdf"]
    assert columns == ["threshold", "fpr", "tpr"]
    for earlier, later in itertools.pairwise(rows):
        assert earlier[0] > later[0]
        assert earlier[1] <= later[1]
        assert earlier[2] <= later[2]
    assert rows[-1][1:] == [1, 1]
