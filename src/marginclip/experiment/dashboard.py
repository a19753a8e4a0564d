"""``marginclip dashboard``: a ready W&B workspace and a report for the runs of a project."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from marginclip.errors import UserError, require
from marginclip.experiment.loggers.wandb import ROC, wandb_mode

SETTINGS = ("attack.name", "defense.name", "defense.lambda_.initial", "seed")  # axes of the parallel coordinates
RESULTS = ("repaired/acc", "repaired/asr", "repaired/pacc", "detector/auroc")
PINNED = ("none/acc", "none/asr", *RESULTS)
NO_KEY = (
    "no Weights & Biases API key is configured, so nothing can be saved there: get one (wandb login, or WANDB_API_KEY), upload offline "
    "runs (wandb sync runs/*/wandb/offline-*), and say this again; --output FILE writes the specification without a key"
)


def main(arguments: list[str]) -> int:
    """Save workspace and report, or write their specification; returns the exit status: 0, or 1 after a mistake, told in one sentence."""
    parser = argparse.ArgumentParser(
        prog="marginclip dashboard",
        description="Save a ready W&B workspace and report for the runs of a project.",
        allow_abbrev=False,
    )
    parser.add_argument("--entity", required=True, help="user or team that the project belongs to")
    parser.add_argument("--project", default="marginclip")
    parser.add_argument("--group", help="show the runs of this sweep alone")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the specification, as JSON, instead of saving anything"
    )
    given = parser.parse_args(arguments)
    try:
        made = Dashboard(given.entity, given.project, given.group)
        if given.output is not None:
            given.output.write_text(json.dumps(made.specification(), indent=2) + "\n")
            print(given.output)
            return 0
        require(bool(os.environ.get("WANDB_API_KEY")) or wandb_mode("auto") == "online", NO_KEY)
        for url in made.save():
            print(url)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class Dashboard:
    """A workspace and a report of the runs of ``entity/project``, of one sweep where ``group`` names it."""

    def __init__(self, entity: str, project: str, group: str | None = None) -> None:
        try:
            import wandb_workspaces.reports.v2 as reports
            import wandb_workspaces.workspaces as workspaces
        except ImportError as error:
            raise UserError("marginclip dashboard is not installed: pip install 'marginclip[dashboard]'") from error
        self.entity, self.project, self.group = entity, project, group
        self.reports, self.workspaces = reports, workspaces

    def save(self) -> list[str]:
        """Save both; returns where they are."""
        return [str(self.workspace().save().url), str(self.report().save().url)]

    def specification(self) -> dict[str, Any]:
        """What would be saved, as plain content."""
        parts = {"workspace": self.workspace(), "report": self.report()}
        return {
            name: json.loads(part._to_model().model_dump_json(by_alias=True, exclude_none=True)) for name, part in parts.items()
        }

    def workspace(self) -> Any:
        """Sections of panels beside the table of runs."""
        made = self.workspaces
        sections = [made.Section(name=name, panels=panels, is_open=True) for name, panels in self.panels().items()]
        filters = self.filters("JobType in ['defend', 'sweep']")
        settings = made.RunsetSettings(filters=filters, pinned_columns=[f"summary:{name}" for name in PINNED])
        return made.Workspace(
            entity=self.entity, project=self.project, name=self.title, sections=sections, runset_settings=settings
        )

    def report(self) -> Any:
        """The same panels under headings, with what they show in words; run sets without a name of a project are of the report's own."""
        made = self.reports
        runs = made.Runset(name="runs", filters=self.filters("JobType = 'defend'"))
        sweeps = made.Runset(name="sweeps", filters=self.filters("JobType = 'sweep'"))
        blocks: list[Any] = [made.P("One run is one attack, one defense, one seed. repaired/asr is the share of triggered images that "
                                    "the attacker still gets after the repair; runs whose attack did not take are tagged "
                                    "status=attack_failed.")]  # fmt: skip
        for name, panels in self.panels().items():
            blocks += [made.H2(name), made.PanelGrid(runsets=[sweeps if name == "Pivot" else runs], panels=panels)]
        return made.Report(self.project, self.entity, title=self.title, blocks=blocks, width="fluid")

    @property
    def title(self) -> str:
        """The name of both."""
        return "marginclip" if self.group is None else f"marginclip {self.group}"

    def filters(self, jobs: str) -> str:
        """``jobs``, of the one sweep where there is one."""
        return jobs + (f" and Group = '{self.group}'" if self.group else "")

    def panels(self) -> dict[str, list[Any]]:
        """Panels by the heading that they stand under."""
        made = self.reports
        bars = [
            made.BarPlot(title=f"{name}, mean over runs", metrics=[made.SummaryMetric(name)], groupby=made.Config("defense.name"),
                         groupby_aggfunc="mean", groupby_rangefunc="stddev")
            for name in RESULTS
        ]  # fmt: skip
        axes = [made.ParallelCoordinatesPlotColumn(made.Config(name), log=name.endswith("initial")) for name in SETTINGS]
        axes += [made.ParallelCoordinatesPlotColumn(made.SummaryMetric(name)) for name in RESULTS]
        roc = made.CustomChart(
            query={"summaryTable": {"tableKey": ROC}}, chart_name="wandb/line/v0", chart_fields={"x": "fpr", "y": "tpr"},
            chart_strings={"title": "ROC of the detector"},
        )  # fmt: skip
        return {
            "Defenses": bars,
            "Pivot": [made.WeavePanelSummaryTable(table_name="pivot", layout=made.Layout(w=24, h=10))],
            "Settings and results": [made.ParallelCoordinatesPlot(columns=axes, layout=made.Layout(w=24, h=10))],
            "Detection": [roc],
            "Triggered images": [made.MediaBrowser(title="clean | triggered", media_keys=["examples"], num_columns=4)],
            "Runs side by side": [made.RunComparer(diff_only="split", layout=made.Layout(w=24, h=14))],
        }
