"""``logger=mlflow``: runs of an MLflow experiment, in a folder or on a server."""

from __future__ import annotations

import os
from pathlib import Path

from marginclip.errors import UserError
from marginclip.experiment.loggers.base import Destination, LoggedRun, summary_metrics
from marginclip.experiment.loggers.tensorboard import scalars
from marginclip.record import RunRecord


class MLflow(Destination):
    """Runs of an MLflow experiment.

    Args:
        experiment: name of the experiment.
        tracking_uri: the folder or server that keeps it. None: that of MLFLOW_TRACKING_URI, else ``runs_dir/mlruns``.
        group: the sweep that a run is part of, kept as a tag. None: the one that the command line runs it in, else none.
    """

    def __init__(self, *, experiment: str = "marginclip", tracking_uri: str | None = None, group: str | None = None) -> None:
        self.experiment, self.tracking_uri, self.group = experiment, tracking_uri, group

    def start(self, run: LoggedRun) -> None:
        """See :meth:`Destination.start`. Raises :class:`UserError` where MLflow is not installed."""
        # MLflow prefers a database and refuses a folder, which needs no server and can be copied, unless it is allowed.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"file:{(run.spec.runs_dir / 'mlruns').absolute()}"
        tags = {**run.labels, "job_type": run.job, "victim": run.victim, "group": self.group or ""}
        try:
            from lightning.pytorch.loggers import MLFlowLogger

            self.lightning = MLFlowLogger(self.experiment, run_name=run.name, tracking_uri=uri, tags=tags)
        except ImportError as error:
            raise UserError("logger=mlflow is not installed: pip install 'marginclip[mlflow]'") from error

    def publish(self, record: RunRecord, figures: list[Path]) -> None:
        """See :meth:`Destination.publish`."""
        self.lightning.log_hyperparams(dict(scalars(record.identity)))
        self.lightning.log_metrics(summary_metrics(record))
        client, run_id = self.lightning.experiment, self.lightning.run_id
        client.set_tag(run_id, "status", record.status)
        for path in figures:
            client.log_artifact(run_id, str(path), "figures")
