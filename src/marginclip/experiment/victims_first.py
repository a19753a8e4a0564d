"""A sweep in two stages where jobs run side by side: first the distinct victims, each once, then the cells that need them.

Otherwise the cells of one victim would wait for the first of them to train it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from marginclip.experiment.command import plain, victim_job
from marginclip.experiment.sweep_display import Watching
from marginclip.experiment.sweep_state import VICTIMS
from marginclip.sweep_files import ASKED

_watching: list[Watching] = []  # not the callback's own, which launchers send to their workers
log = logging.getLogger(__name__)
SUBDIR = f"hydra.sweep.subdir='{VICTIMS}/${{hydra.job.num}}'"


class VictimsFirst(Callback):
    """Runs in the launching process, before the first job and after the last."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note what is asked for; train victims that several cells need; show how far the sweep is."""
        if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):  # others decide about cells as they go on
            return
        sweep_dir, cells = Path(config.hydra.sweep.dir), asked_cells(config)
        note(sweep_dir, cells, str(config.hydra.job.config_name))
        if config.hydra.launcher._target_.endswith(
            ".BasicLauncher"
        ):  # one job at a time: nobody waits, and it shows the sweep itself
            return
        _watching.append(Watching(sweep_dir))
        if config.hydra.job.config_name == "defend":
            first = first_stage(config, cells)
            if first:
                log.warning("first %d victims, then the %d cells that need them", len(first), len(cells))
                note(sweep_dir / VICTIMS, first, "train")
                launch(config, first)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show it no longer."""
        while _watching:
            _watching.pop().stop()


def asked_cells(config: DictConfig) -> list[list[str]]:
    """The overrides of every job of a multirun, in the order in which they are numbered, as Hydra's own sweeper splits them."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(
        [*params, *config.hydra.overrides.task]
    )
    return [list(cell) for batch in BasicSweeper.split_arguments(overrides, max_batch_size=None) for cell in batch]


def note(folder: Path, cells: list[list[str]], command: str) -> None:
    """Write what was asked for, and by which ``command``, into the folder of a stage, so that what is missing can be told."""
    from marginclip.files import write_json

    write_json(folder / ASKED, {"command": command, "asked": [" ".join(cell) for cell in cells]})


def first_stage(config: DictConfig, cells: list[list[str]]) -> list[list[str]]:
    """A cell of every victim that is not trained yet; empty where no two cells need the same one."""
    needed: dict[Path, list[list[str]]] = {}
    for cell, victim in needed_victims(config, cells):
        needed.setdefault(victim, []).append(cell)
    shared = any(len(having) > 1 for having in needed.values())
    return [having[0] for having in needed.values()] if shared else []


def needed_victims(config: DictConfig, cells: list[list[str]]) -> Iterator[tuple[list[str], Path]]:
    """The cells that are not done, with their victims that are not trained. What is wrong with a cell its own job tells."""
    from marginclip.errors import UserError
    from marginclip.experiment.recipe import find_victim
    from marginclip.experiment.recording import finished_record
    from marginclip.experiment.spec import run_spec

    for cell in cells:
        composed = GlobalHydra.instance().config_loader().load_sweep_config(config, cell)
        with open_dict(composed):
            del composed["hydra"]
        try:
            spec = run_spec(plain(composed))
            if not spec.from_checkpoint and finished_record(spec) is None and (victim := find_victim(spec)).record is None:
                yield cell, victim.folder
        except (UserError, OSError):
            continue


def launch(config: DictConfig, cells: list[list[str]]) -> None:
    """Train the victims of ``cells`` with the launcher of the sweep; on Slurm as jobs that those of the second stage depend on."""
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=victim_job, config=config)
    overrides = [[*cell, SUBDIR] for cell in cells]
    if not config.hydra.launcher._target_.endswith(".SlurmLauncher"):
        launcher.launch(overrides, initial_job_idx=0)
        return
    from marginclip.experiment.slurm import submit

    after = f"afterany:{submit(launcher, overrides)}"  # of a victim that failed, the cells say why
    given = config.hydra.launcher.additional_parameters.get("dependency")
    with open_dict(config):
        OmegaConf.update(
            config,
            "hydra.launcher.additional_parameters.dependency",
            f"{given},{after}" if given else after,
            force_add=True,
        )
