"""The command line around Hydra: mistakes are found before anything heavy is imported, and told in one sentence."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from marginclip.errors import UserError, printable
from marginclip.experiment.override_checks import check_overrides
from marginclip.sweep_files import OUTCOME

if TYPE_CHECKING:
    from marginclip.experiment.spec import RunSpec

log = logging.getLogger(__name__)
_failures: list[dict[str, Any]] = []
SUSPICIOUS = 3  # the exit status of an audit that found something
_found: list[bool] = []  # of each audit, whether it found something


def command_line(command: str, config_dir: Path) -> None:
    """Check the command line's overrides, run the Hydra task of ``command``, and exit with 1 when a run failed."""
    arguments = get_args_parser().parse_intermixed_args()
    try:
        own = own_options(arguments.config_dir)
        if not (arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion):
            check_overrides(list(arguments.overrides), command, config_dir, own)
    except UserError as error:
        sys.exit(f"error: {error}")
    if own is not None:  # Hydra looks into --config-dir last: ours goes there, so that the user's options come before ours
        sys.argv = [*without_config_dir(sys.argv), "--config-dir", str(config_dir)]
    hydra.main(version_base="1.3", config_path=str(own or config_dir), config_name=command)(TASKS[command])()
    if _failures:
        sys.exit(1)
    if any(_found):
        sys.exit(SUSPICIOUS)


def own_options(folder: str | None) -> Path | None:
    """The user's ``--config-dir``, which must hold a group with an option; None where none was given."""
    if folder is None:
        return None
    path = Path(folder).resolve()
    if not path.is_dir():
        raise UserError(f"--config-dir='{folder}' is not a folder")
    if not any(path.glob("*/**/*.yaml")):
        raise UserError(
            f"--config-dir='{folder}' holds no option: it needs folders named as groups, as in {folder}/attack/mine.yaml"
        )
    return path


def without_config_dir(words: list[str]) -> list[str]:
    """The words of a command line without ``--config-dir`` and its folder, in all spellings."""
    flags, kept = ("--config-dir", "-cd"), list[str]()
    for previous, word in zip(["", *words], words, strict=False):
        if previous not in flags and word not in flags and not word.startswith("--config-dir="):
            kept.append(word)
    return kept


def train_job(config: DictConfig) -> None:
    """What Hydra calls for each job of ``marginclip train``."""
    run_job(config, _train)


def defend_job(config: DictConfig) -> None:
    """What Hydra calls for each job of ``marginclip defend``."""
    run_job(config, _defend)


def victim_job(config: DictConfig) -> None:
    """What Hydra calls for each victim of the first stage of a sweep of ``marginclip defend``."""
    run_job(config, _prepare_victim)


def audit_job(config: DictConfig) -> None:
    """What Hydra calls for ``marginclip audit``."""
    run_job(config, _audit, own=("output", "images_suspect", "json", "memory_gib"))


def repair_job(config: DictConfig) -> None:
    """What Hydra calls for ``marginclip repair``."""
    run_job(config, _repair, own=("output", "tolerance", "json", "memory_gib"))


TASKS: dict[str, Callable[[DictConfig], None]] = {
    "train": train_job, "defend": defend_job, "audit": audit_job, "repair": repair_job
}  # fmt: skip


def _audit(spec: RunSpec, **settings: Any) -> str:
    from marginclip.experiment.handed_over import audit_model

    suspicious, told = audit_model(spec, **settings)
    _found.append(suspicious)
    return told


def _repair(spec: RunSpec, **settings: Any) -> str:
    from marginclip.experiment.handed_over import repair_model

    return repair_model(spec, **settings)


def _train(spec: RunSpec) -> str:
    from marginclip.experiment.run import train

    return train(spec)


def _prepare_victim(spec: RunSpec) -> str:
    from marginclip.experiment.run import prepare_victim

    return prepare_victim(spec)


def _defend(spec: RunSpec) -> str:
    from marginclip.experiment.run import defend
    from marginclip.reporting import print_table

    record = defend(spec)
    print_table(record)
    return str(record.path)


def run_job(config: DictConfig, task: Callable[..., str], own: tuple[str, ...] = ()) -> None:
    """Do one job: print its result, or its failure in one sentence, and note the outcome for the end of a sweep.

    A failure is not raised, so that the other runs of a sweep go on with every launcher; what is not the user's mistake is
    logged with its traceback. ``own`` names keys of the command itself, which ``task`` takes beside the specification.
    """
    overrides = " ".join(HydraConfig.get().overrides.task) or "the default run"
    outcome: dict[str, Any] = {"overrides": overrides, "error": None, "record": None}
    with _shown(overrides, signs=not own):
        _attempt(config, task, own, outcome)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _note_outcome(outcome)
    if outcome["error"] is not None:
        print(f"error: {printable(outcome['error'])}", file=sys.stderr)
        _failures.append(outcome)
    else:
        print(outcome["record"], flush=True)


@contextmanager
def _shown(overrides: str, *, signs: bool) -> Iterator[None]:
    """Show inside what the job does, and leave ``signs`` of life for others."""
    from marginclip.experiment import progress
    from marginclip.experiment.signs_of_life import alive
    from marginclip.experiment.sweep_display import display_of

    hydra = HydraConfig.get()
    sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
    alone = sweep is None or hydra.launcher._target_.endswith(".BasicLauncher")  # nobody else writes to this terminal
    progress.use(display_of(sweep if alone else None, bars=alone and sys.stderr.isatty()))
    with alive(Path(hydra.runtime.output_dir), overrides) if signs else nullcontext():
        yield


def _attempt(config: DictConfig, task: Callable[..., str], own: tuple[str, ...], outcome: dict[str, Any]) -> None:
    """Do ``task``, and note in ``outcome`` what became of it."""
    try:
        from marginclip.experiment.replaced_targets import fit_to_targets
        from marginclip.experiment.spec import run_spec
        from marginclip.silence import endings_of_signals

        content = fit_to_targets(plain(config), HydraConfig.get().overrides.task)
        settings = {key: content.pop(key) for key in own}
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            if "output" in settings:  # each run of a sweep writes to a place of its own
                settings["output"] = str(Path(settings["output"]) / str(HydraConfig.get().job.num))
            content["logger"] = with_group(content["logger"], sweep_name(Path(HydraConfig.get().sweep.dir)))
        with endings_of_signals():
            outcome["record"] = task(run_spec(content), **settings)
    except UserError as error:
        outcome["error"] = str(error)
    except OSError as error:
        outcome["error"] = (
            f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}; what was written before is intact"
        )
    except Exception as error:  # a fault of ours, or of a library: told in full, and the sweep goes on
        log.exception("this run failed")
        outcome["error"] = f"{type(error).__name__}: {error}"


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed configuration with all interpolations resolved, as plain containers: Hydra ends here."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def sweep_name(sweep_dir: Path) -> str:
    """What a sweep is called: the last two parts of its folder, a date and a time."""
    return "/".join(sweep_dir.parts[-2:])


def with_group(loggers: dict[str, Any], group: str) -> dict[str, Any]:
    """The settings of the ``logger`` group in which those that can name a group, and name none, name this one."""
    return {
        name: {**settings, "group": group} if settings.get("group", "") is None else settings
        for name, settings in loggers.items()
    }


def _note_outcome(outcome: dict[str, Any]) -> None:
    from marginclip.files import write_json

    try:
        write_json(Path(HydraConfig.get().runtime.output_dir) / OUTCOME, outcome)
    except OSError as error:
        log.warning("the outcome of this job could not be noted: %s", error)


def report_sweep(sweep_dir: Path) -> list[dict[str, Any]]:
    """Name the failed runs of a finished multirun; they make the command exit with 1, whatever launcher ran them. Returns all outcomes."""
    outcomes = [json.loads(path.read_text()) for path in sorted(sweep_dir.glob(f"*/{OUTCOME}"))]
    failed = [outcome for outcome in outcomes if outcome["error"] is not None]
    _failures[:] = failed
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} runs done", flush=True)
    for outcome in failed:
        print(f"failed: {outcome['overrides']}: {outcome['error']}", flush=True)
    return outcomes
