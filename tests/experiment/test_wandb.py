"""Weights & Biases: offline unless a key is configured, and never a prompt."""

import pytest

from marginclip.errors import UserError
from marginclip.experiment.loggers import build_logger, wandb_mode


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
