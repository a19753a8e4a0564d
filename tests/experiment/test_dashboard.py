"""The W&B workspace and report, built without a network."""

import json

import pytest

from marginclip.experiment.dashboard import main
from marginclip.experiment.loggers.base import summary_metrics
from marginclip.experiment.loggers.wandb import tables

pytest.importorskip("wandb_workspaces")


@pytest.fixture(autouse=True)
def no_key(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def nodes(content):
    if isinstance(content, dict):
        yield content
        for value in content.values():
            yield from nodes(value)
    elif isinstance(content, list):
        for value in content:
            yield from nodes(value)


def test_workspace_and_report_show_what_runs_log(tmp_path, finished):
    _, record = finished
    file = tmp_path / "dashboard.json"
    assert main(["--entity", "team", "--project", "repairs", "--group", "2026/sweep", "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    assert (content["workspace"]["entity"], content["workspace"]["project"]) == ("team", "repairs")
    for part in ("workspace", "report"):
        panels = [node for node in nodes(content[part]) if "viewType" in node]
        kinds = [panel["viewType"] for panel in panels]
        assert kinds.count("Bar Chart") == 4
        assert {"Parallel Coordinates Plot", "Run Comparer", "Media Browser", "Weave", "Vega2"} <= {*kinds}
        text = json.dumps(content[part])
        logged = summary_metrics(record)
        bars = [metric for panel in panels if panel["viewType"] == "Bar Chart" for metric in panel["config"]["metrics"]]
        assert {bar.removeprefix("summary_metrics.") for bar in bars} <= {*logged, "detector/auroc"}
        assert "roc/detector" in text
        assert "2026/sweep" in text
        assert "defense.value.lambda_.initial" in text
    assert record.config["defense"]["lambda_"]["initial"] > 0


def test_the_roc_panel_names_a_table_that_runs_log(finished):
    import torch

    arrays = {"scores/mmdf_clean": torch.rand(5), "scores/mmdf_triggered": torch.rand(5)}
    assert "roc/detector" in [name for name, _, _ in tables(finished[1], arrays)]


def test_without_a_key_it_says_what_to_do(capsys):
    assert main(["--entity", "team"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "wandb login" in error
    assert "--output FILE" in error


def test_what_is_saved_is_both(monkeypatch, capsys):
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    saved = []

    def save(self):
        saved.append(type(self).__name__)
        return self

    for kind in (reports.Report, workspaces.Workspace):
        monkeypatch.setattr(kind, "save", save)
        monkeypatch.setattr(kind, "url", property(lambda self: f"https://{type(self).__name__}"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert main(["--entity", "team"]) == 0
    assert saved == ["Workspace", "Report"]
    assert capsys.readouterr().out.split() == ["https://Workspace", "https://Report"]
