"""Experiment loggers: Weights & Biases (offline unless a key is configured), CSV files, or none."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from marginclip.errors import require
from marginclip.experiment.recipe import find_victim
from marginclip.experiment.spec import RunSpec
from marginclip.record import RunRecord


def wandb_mode(choice: str) -> str:
    """``online`` or ``offline``: with ``auto``, online only where an API key is configured, so nothing ever prompts."""
    require(choice in ("auto", "online", "offline"), f"logger.mode must be auto, online or offline, got '{choice}'")
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


def build_logger(spec: RunSpec, folder: Path, *, job: str, name: str) -> Any:
    """The Lightning logger of the ``logger`` group, writing under ``folder``; False for none."""
    chosen = spec.logger
    if chosen.kind == "none":
        return False
    if chosen.kind == "csv":
        from lightning.pytorch.loggers import CSVLogger

        keep_earlier_rows(folder / "csv")
        return CSVLogger(str(folder), name="csv", version="")
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    mode = wandb_mode(chosen.mode)
    os.environ.setdefault("WANDB_SILENT", "true")
    require(
        mode == "offline" or bool(wandb.api.api_key),
        "logger.mode=online needs a Weights & Biases API key (wandb login, or WANDB_API_KEY); logger.mode=offline needs none",
    )
    folder.mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        name=name,
        save_dir=str(folder),
        project=chosen.project,
        group=chosen.group,
        job_type=job,
        tags=run_tags(spec),
        offline=mode == "offline",
        config={**spec.config, "victim_name": victim_name(spec)},
        settings=wandb.Settings(console="off"),
    )


def run_tags(spec: RunSpec) -> list[str]:
    """What runs are filtered by: data set, model, attack, X2X setting and defense."""
    named = {
        "dataset": spec.dataset.choice.name, "model": spec.model.name, "attack": "none" if spec.attack is None else spec.attack.name,
        "x2x": None if spec.attack is None or spec.x2x is None else spec.x2x.name,
        "defense": None if spec.defense is None else spec.defense.choice.name,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in named.items() if value is not None]


def victim_name(spec: RunSpec) -> str:
    """The name that a victim and all runs of it share, so that they can be joined."""
    return str(spec.weights) if spec.from_checkpoint else find_victim(spec).folder.name


def keep_earlier_rows(folder: Path) -> None:
    """Give ``metrics.csv`` of an interrupted run a number, as the logger of the run that goes on would remove it."""
    file = folder / "metrics.csv"
    if file.exists():
        file.rename(folder / f"metrics-{1 + len(list(folder.glob('metrics-*.csv')))}.csv")


def finish_logger(logger: Any) -> None:
    """Close a W&B run, so that the next job of a sweep in this process starts a run of its own."""
    if type(logger).__name__ == "WandbLogger":
        import wandb

        wandb.finish()


def publish(logger: Any, record: RunRecord, *, draw: bool) -> None:
    """Draw the run's figures (``draw``) and send its metrics, table and figures to the logger."""
    from marginclip.reporting import draw_figures

    figures = draw_figures(record.folder) if draw else []
    if not logger:
        return
    flat = {f"{row}/{name}": value for row, values in record.metrics.items() for name, value in values.items()}
    flat |= {f"seconds/{phase}": seconds for phase, seconds in record.seconds.items()}
    if (detection := record.detection) is not None:
        flat |= {f"detection/{name}": float(getattr(detection, name)) for name in ("p_value", "detected", "suspect")}
    logger.log_metrics(flat)
    if type(logger).__name__ != "WandbLogger":
        logger.save()
        return
    import wandb

    columns: list[Any] = ["method", *sorted({name for values in record.metrics.values() for name in values})]
    rows = [[row, *(values.get(name) for name in columns[1:])] for row, values in record.metrics.items()]
    logger.experiment.log({"results": wandb.Table(columns=columns, data=rows)})
    logger.experiment.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})
    for name, columns, rows in _tables(record):
        logger.experiment.log({name: wandb.Table(columns=columns, data=rows)})
    logger.experiment.tags = (*logger.experiment.tags, f"status={record.status}")
    logger.experiment.summary.update(flat | {"status": record.status})


def _tables(record: RunRecord) -> Iterator[tuple[str, list[Any], list[list[Any]]]]:
    """Tables for the dashboard: the accuracy of every class by row, and the ROC curve of every detector whose scores were kept."""
    if record.per_class:
        columns = ["class", *record.per_class]
        yield "per_class", columns, [list(line) for line in zip(record.classes, *record.per_class.values(), strict=False)]
    file = record.folder / "arrays.safetensors"
    arrays = load_file(file) if file.exists() else {}
    for name, clean in arrays.items():
        triggered = arrays.get(name.removesuffix("_clean") + "_triggered") if name.startswith("scores/") else None
        if triggered is None or not name.endswith("_clean") or not len(clean) or not len(triggered):
            continue
        thresholds = torch.cat([clean, triggered]).unique().flip(0)
        chosen = thresholds[torch.linspace(0, len(thresholds) - 1, min(100, len(thresholds))).long()]
        points = [[float(t), float((clean >= t).float().mean()), float((triggered >= t).float().mean())] for t in chosen]
        yield f"roc/{name.partition('/')[2].removesuffix('_clean')}", ["threshold", "fpr", "tpr"], points
