"""Keeping the record of a run while the run goes on."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from marginclip.devices import gpu_wanted
from marginclip.errors import UserError
from marginclip.experiment import progress
from marginclip.experiment.recipe import run_folder, run_identity
from marginclip.experiment.spec import RunSpec
from marginclip.precision import precision_for
from marginclip.record import Device, RunRecord, Status, read_record

PACKAGES = ("marginclip", "torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "wandb")


def finished_record(spec: RunSpec) -> RunRecord | None:
    """The record of the run where it was done before; None where it was not, failed, or left a record that cannot be read."""
    try:
        found = read_record(run_folder(spec))
    except UserError:
        return None
    return found if found.finished else None


def opened_record(spec: RunSpec) -> RunRecord:
    """The record of a run that begins: what was asked for, with what, and where."""
    gpu = gpu_wanted(spec.trainer.accelerator)
    name = torch.cuda.get_device_name() if gpu else platform.machine()
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    return RunRecord(
        config=dict(spec.config),
        identity=run_identity(spec),
        seed=spec.seed,
        versions={name: found for name, found in versions.items() if found is not None},
        device=Device(name=name, accelerator="gpu" if gpu else "cpu", threads=torch.get_num_threads()),
        precision=precision_for(spec.trainer.precision, accelerator=spec.trainer.accelerator),
    ).at(run_folder(spec))


@contextmanager
def phase(record: RunRecord, name: str) -> Iterator[None]:
    """Show that the block goes on, and note the seconds that it takes under ``name``."""
    started = time.perf_counter()
    with progress.task(name):
        yield
    record.seconds[name] = round(record.seconds.get(name, 0.0) + time.perf_counter() - started, 3)


def finish(record: RunRecord, status: Status) -> None:
    """Write the record with its final status."""
    record.status, record.peak_memory_mib = status, peak_memory_mib()
    record.write()


@contextmanager
def failures_recorded(record: RunRecord) -> Iterator[None]:
    """On an exception write the record with status ``failed`` and the reason, then let the exception go on."""
    try:
        yield
    except Exception as error:
        record.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # a full disk takes no record; the first error is the one to report
            finish(record, "failed")
        raise


def peak_memory_mib() -> dict[str, float]:
    """The most memory that the process held so far, and the most on the GPU where one was used."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    peak = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # wandb, where only logger=none and csv are used
        return None
