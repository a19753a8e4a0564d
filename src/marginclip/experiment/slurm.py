"""Submitting jobs to Slurm without waiting for them, which Hydra's launcher does."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def submit(launcher: Any, job_overrides: list[list[str]]) -> str:
    """Submit the jobs as one array with the settings of ``launcher``, of hydra-submitit-launcher; returns the number of the array."""
    import submitit
    from hydra.core.singleton import Singleton
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from omegaconf import OmegaConf

    Path(str(launcher.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    settings = dict(launcher.params)
    executor = submitit.AutoExecutor(
        cluster="slurm", folder=settings.pop("submitit_folder"), slurm_max_num_timeout=settings.pop("max_num_timeout")
    )
    common = set(OmegaConf.structured(BaseQueueConf).keys())
    executor.update_parameters(**{key if key in common else f"slurm_{key}": value for key, value in settings.items()})
    state = Singleton.get_state()
    jobs = executor.map_array(
        launcher,
        *zip(*[(each, "hydra.sweep.dir", i, f"victim_{i}", state) for i, each in enumerate(job_overrides)], strict=True),
    )
    return str(jobs[0].job_id).partition("_")[0]
