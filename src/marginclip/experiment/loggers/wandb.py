"""``logger=wandb``: Weights & Biases, offline unless a key is configured."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from marginclip.errors import require
from marginclip.experiment.loggers.base import Destination, LoggedRun, summary_metrics
from marginclip.record import RunRecord

Table = tuple[str, list[str], list[list[Any]]]  # name, columns, rows
MAX_POINTS = 100  # of a ROC curve
ROC = "roc/detector"


class WandB(Destination):
    """A run of a Weights & Biases project.

    Args:
        mode: ``online``, ``offline`` or ``auto``, which is online where an API key is configured, so nothing ever prompts.
        project: name of the project.
        entity: user or team that the project belongs to. None: the login's own.
        group: the group of the run. None: the sweep that the command line runs it in, else none.

    Raises:
        UserError: for another mode. :meth:`start` raises it for an online run without a key.
    """

    def __init__(
        self, *, mode: str = "auto", project: str = "marginclip", entity: str | None = None, group: str | None = None
    ) -> None:
        self.mode, self.project, self.entity, self.group = wandb_mode(mode), project, entity, group

    def start(self, run: LoggedRun) -> None:
        """See :meth:`Destination.start`. The W&B run begins with the first thing that is logged."""
        from lightning.pytorch.loggers import WandbLogger

        run.folder.mkdir(parents=True, exist_ok=True)
        self.lightning = WandbLogger(
            name=run.name,
            save_dir=str(run.folder),
            config={**run.spec.config, "victim_name": run.victim},
            tags=[f"{key}={value}" for key, value in run.labels.items()],
            job_type=run.job,
            **self.settings(),
        )
        self.lightning._wandb_init.pop("anonymous", None)  # Lightning sets it always, and W&B warns of it

    def settings(self) -> dict[str, Any]:
        """What all runs share. Raises :class:`UserError` for an online run without a key."""
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        require(
            self.mode == "offline" or bool(wandb.api.api_key),
            "logger.wandb.mode=online needs a Weights & Biases API key (wandb login, or WANDB_API_KEY); "
            "logger.wandb.mode=offline needs none",
        )
        return {
            "mode": self.mode, "project": self.project, "entity": self.entity, "group": self.group,
            "settings": wandb.Settings(console="off"),
        }  # fmt: skip

    def publish(self, record: RunRecord, figures: list[Path]) -> None:
        """See :meth:`Destination.publish`. Tables and images beside the metrics."""
        import wandb

        run, metrics = self.lightning.experiment, summary_metrics(record)
        self.lightning.log_metrics(metrics)
        run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})
        arrays = kept_arrays(record.folder)
        run.log({name: wandb.Table(columns=list(columns), data=rows) for name, columns, rows in tables(record, arrays)})
        if examples := captioned_examples(record, arrays):
            run.log({"examples": [wandb.Image(image, caption=caption) for image, caption in examples]})
        run.tags = (*run.tags, f"status={record.status}")
        run.summary.update({**metrics, "status": record.status})

    def publish_sweep(self, sweep_dir: Path, tables: Mapping[str, tuple[list[str], list[list[Any]]]]) -> None:
        """See :meth:`Destination.publish_sweep`. A run of its own, ``job_type`` sweep, in the group of the sweep."""
        import wandb

        with wandb.init(name=f"sweep {self.group}", job_type="sweep", dir=str(sweep_dir), **self.settings()) as run:
            run.log({name: wandb.Table(columns=list(columns), data=rows) for name, (columns, rows) in tables.items()})

    def close(self, status: str) -> None:
        """See :meth:`Destination.close`. A run that logged nothing leaves nothing."""
        run = self.lightning._experiment
        if run is None:
            return
        if status == "failed":
            run.tags = (*run.tags, "status=failed")
        run.finish(exit_code=0 if status == "done" else 1)


def wandb_mode(choice: str) -> str:
    """``online`` or ``offline``: with ``auto``, online only where an API key is configured, so nothing ever prompts."""
    require(choice in ("auto", "online", "offline"), f"logger.wandb.mode must be auto, online or offline, got '{choice}'")
    if choice != "auto":
        return choice
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return "offline"
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"


def _netrc_has_key() -> bool:
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def kept_arrays(folder: Path) -> dict[str, Tensor]:
    """The arrays that a run left; none where it left none."""
    file = folder / "arrays.safetensors"
    return load_file(file) if file.exists() else {}


def tables(record: RunRecord, arrays: dict[str, Tensor]) -> Iterator[Table]:
    """The results row by row, the accuracy of every class, and the ROC curve of the detector, where its scores were kept.

    They are named alike in all runs, so that the tables of many runs can be shown as one.
    """
    columns = sorted({name for values in record.metrics.values() for name in values})
    yield "results", ["method", *columns], [[row, *map(values.get, columns)] for row, values in record.metrics.items()]
    if record.per_class:
        rows = [list(line) for line in zip(record.classes, *record.per_class.values(), strict=False)]
        yield "per_class", ["class", *record.per_class], rows
    clean, triggered = (
        next((each for name, each in arrays.items() if name.startswith("scores/") and name.endswith(kind)), torch.empty(0))
        for kind in ("_clean", "_triggered")
    )
    if len(clean) and len(triggered):
        yield ROC, ["threshold", "fpr", "tpr"], _roc(clean, triggered)


def _roc(clean: Tensor, triggered: Tensor) -> list[list[float]]:
    """Threshold, false- and true-positive rate, from the highest threshold to the lowest."""
    thresholds = torch.cat([clean, triggered]).unique().flip(0)
    chosen = thresholds[torch.linspace(0, len(thresholds) - 1, min(MAX_POINTS, len(thresholds))).long()]
    return [[float(t), float((clean >= t).float().mean()), float((triggered >= t).float().mean())] for t in chosen]


def captioned_examples(record: RunRecord, arrays: dict[str, Tensor]) -> list[tuple[np.ndarray, str]]:
    """Triggered images beside the same without trigger, 8 bits (H, 2 W, C), each with ``label → target`` as caption."""
    pairs = [arrays.get(f"examples/{kind}") for kind in ("clean", "triggered", "labels", "targets")]
    if any(each is None for each in pairs):
        return []
    clean, triggered, labels, targets = (each for each in pairs if each is not None)
    images = (torch.cat([clean, triggered], dim=3) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    captions = [f"{record.class_name(int(a))} → {record.class_name(int(b))}" for a, b in zip(labels, targets, strict=True)]
    return list(zip([image.squeeze(2) if image.shape[2] == 1 else image for image in images], captions, strict=True))
