"""``logger=csv``: curves as rows of a file."""

from __future__ import annotations

from pathlib import Path

from marginclip.experiment.loggers.base import Destination, LoggedRun


class CsvRows(Destination):
    """Writes ``csv/metrics.csv`` in the folder of the run."""

    def start(self, run: LoggedRun) -> None:
        """See :meth:`Destination.start`."""
        from lightning.pytorch.loggers import CSVLogger

        keep_earlier_rows(run.folder / "csv")
        self.lightning = CSVLogger(str(run.folder), name="csv", version="")


def keep_earlier_rows(folder: Path) -> None:
    """Give ``metrics.csv`` of an interrupted run a number, as the logger of the run that goes on would remove it."""
    file = folder / "metrics.csv"
    if file.exists():
        file.rename(folder / f"metrics-{1 + len(list(folder.glob('metrics-*.csv')))}.csv")
