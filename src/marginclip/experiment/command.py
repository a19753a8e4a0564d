"""The command line around Hydra: mistakes are found before anything heavy is imported, and told in one sentence."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from marginclip.errors import UserError, nearest

if TYPE_CHECKING:
    from marginclip.experiment.spec import RunSpec

log = logging.getLogger(__name__)
OUTCOME = "outcome.json"
_failures: list[dict[str, Any]] = []


def command_line(command: str, config_dir: Path) -> None:
    """Check the command line's overrides, run the Hydra task of ``command``, and exit with 1 when a run failed."""
    arguments = get_args_parser().parse_intermixed_args()
    if not (arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion):
        try:
            check_overrides(list(arguments.overrides), command, config_dir, own_options(arguments.config_dir))
        except UserError as error:
            sys.exit(f"error: {error}")
    hydra.main(version_base="1.3", config_path=str(config_dir), config_name=command)(TASKS[command])()
    if _failures:
        sys.exit(1)


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


def train_job(config: DictConfig) -> None:
    """What Hydra calls for each job of ``marginclip train``."""
    run_job(config, _train)


def defend_job(config: DictConfig) -> None:
    """What Hydra calls for each job of ``marginclip defend``."""
    run_job(config, _defend)


TASKS: dict[str, Callable[[DictConfig], None]] = {"train": train_job, "defend": defend_job}


def _train(spec: RunSpec) -> str:
    from marginclip.experiment.run import train

    return train(spec)


def _defend(spec: RunSpec) -> str:
    from marginclip.experiment.run import defend
    from marginclip.reporting import print_table

    record = defend(spec)
    print_table(record)
    return str(record.path)


def run_job(config: DictConfig, task: Callable[[RunSpec], str]) -> None:
    """Do one job: print its result, or its failure in one sentence, and note the outcome for the end of a sweep.

    A failure is not raised, so that the other cells of a sweep go on with every launcher; what is not the user's mistake is
    logged with its traceback.
    """
    overrides = " ".join(HydraConfig.get().overrides.task) or "the default run"
    outcome: dict[str, Any] = {"overrides": overrides, "error": None, "record": None}
    try:
        from marginclip.experiment.spec import run_spec

        outcome["record"] = task(run_spec(plain(config)))
    except UserError as error:
        outcome["error"] = str(error)
    except OSError as error:
        outcome["error"] = (
            f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}; what was written before is intact"
        )
    except Exception as error:  # a fault of ours, or of a library: told in full, and the sweep goes on
        log.exception("this run failed")
        outcome["error"] = f"{type(error).__name__}: {error}"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _note_outcome(outcome)
    if outcome["error"] is not None:
        print(f"error: {outcome['error']}", file=sys.stderr)
        _failures.append(outcome)
    else:
        print(outcome["record"], flush=True)


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed configuration with all interpolations resolved, as plain containers: Hydra ends here."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _note_outcome(outcome: dict[str, Any]) -> None:
    try:
        (Path(HydraConfig.get().runtime.output_dir) / OUTCOME).write_text(json.dumps(outcome))
    except OSError as error:
        log.warning("the outcome of this job could not be noted: %s", error)


def report_sweep(sweep_dir: Path) -> None:
    """Name the failed cells of a finished multirun; they make the command exit with 1, whatever launcher ran them."""
    outcomes = [json.loads(path.read_text()) for path in sorted(sweep_dir.glob(f"*/{OUTCOME}"))]
    failed = [outcome for outcome in outcomes if outcome["error"] is not None]
    _failures[:] = failed
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} runs done", flush=True)
    for outcome in failed:
        print(f"failed: {outcome['overrides']}: {outcome['error']}", flush=True)


def check_overrides(overrides: list[str], config_name: str, config_dir: Path, own: Path | None = None) -> None:
    """Compose the configuration for every choice of a sweep; raises :class:`UserError` naming the nearest valid option or key."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        bad = next((text for text in overrides if "=" not in text and not text.startswith("~")), None)
        if bad is not None:
            raise UserError(f"'{bad}' is not an option: options are written key=value, for example attack=badnet") from error
        raise UserError(f"the options cannot be read: {str(error).splitlines()[0]}") from error
    search = [] if own is None else [f"hydra.searchpath=[file://{own}]"]
    with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"), _searching(search):
        seen: set[str] = set()
        for variant in _variants(parsed):
            _check_variant(variant, config_name, config_dir)
            experiment = next((text for text in variant if text.startswith("experiment=")), None)
            if experiment is not None and experiment not in seen:
                seen.add(experiment)
                for cell in _variants(_swept_by(experiment, variant, config_name)):
                    _check_variant(cell + variant, config_name, config_dir)


_search: list[str] = []


@contextmanager
def _searching(overrides: list[str]) -> Iterator[None]:
    """Inside, every composition also looks in the user's own folder."""
    _search[:] = overrides
    try:
        yield
    finally:
        _search.clear()


def compose(config_name: str, *, overrides: Sequence[str] = (), return_hydra_config: bool = False) -> DictConfig:
    """Hydra's ``compose``, with the user's own options where there are any."""
    return hydra_compose(config_name, overrides=[*overrides, *_search], return_hydra_config=return_hydra_config)


def _check_variant(variant: list[str], config_name: str, config_dir: Path) -> None:
    _refuse_missing_groups(variant, config_dir)
    _refuse_unusable_folder(Path(str(_compose(variant, config_name, config_dir).runs_dir)))
    _refuse_replaced_groups(variant, config_name, config_dir)


def _refuse_unusable_folder(runs_dir: Path) -> None:
    """Refuse a ``runs_dir`` that cannot be made or written to: Hydra makes it before any of our code runs."""
    there = next(folder for folder in (runs_dir.absolute(), *runs_dir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"runs_dir='{runs_dir}' cannot be used: '{there}' is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"runs_dir='{runs_dir}' cannot be used: '{there}' cannot be written to")


def _swept_by(experiment: str, variant: list[str], config_name: str) -> list[Override]:
    """What the experiment sweeps by itself, where the command line does not say otherwise."""
    own = compose(config_name, overrides=[experiment], return_hydra_config=True).hydra
    params = (own.sweeper.params or {}) if own.mode == RunMode.MULTIRUN else {}
    given = {text.lstrip("+").partition("=")[0] for text in variant}
    return OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items() if key not in given])


def _variants(parsed: list[Override]) -> Iterator[list[str]]:
    """Override lists without sweeps: every choice of every sweep appears in at least one."""
    choices = [_choices(override) for override in parsed]
    yield [options[0] for options in choices]
    for position, options in enumerate(choices):
        for option in options[1:]:
            yield [option if index == position else other[0] for index, other in enumerate(choices)]


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line or ""]
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        raise UserError(
            f"'{override.input_line}' is an interval: list the values to run, as {key}=0,1, or write {key}=range(0,3)"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _compose(overrides: list[str], config_name: str, config_dir: Path) -> DictConfig:
    try:
        config = compose(config_name, overrides=[text for text in overrides if not text.startswith("hydra.")])
        OmegaConf.to_container(config, resolve=True)
        return config
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        options = list(error.options or [])
        if group == "hydra/launcher" and option in ("joblib", "submitit_local", "submitit_slurm"):
            raise UserError(
                f"hydra/launcher={option} is not installed: pip install hydra-{option.partition('_')[0]}-launcher"
            ) from error
        raise UserError(
            f"unknown option {group}={option}{nearest(option, options)} (there are {', '.join(sorted(options))})"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, config_name, overrides, config_dir)) from error


def _refuse_missing_groups(overrides: list[str], config_dir: Path) -> None:
    """Refuse ``defense=null`` and ``~defense``: a run has one option of every group at the top."""
    for text in overrides:
        key, _, value = text.lstrip("~+").partition("=")
        options = (
            sorted(file.stem for file in (config_dir / key).glob("*.yaml"))
            if not {".", "/"} & {*key} and key != "experiment"
            else []
        )
        if options and (text.startswith("~") or value in ("null", "")):
            hint = f"use {key}=none" if "none" in options else f"there are {', '.join(options)}"
            raise UserError(f"'{text}' leaves the run without {key}; {hint}")


def _refuse_replaced_groups(overrides: list[str], config_name: str, config_dir: Path) -> None:
    """Refuse ``defense.detector=paper``, which would put a word in the place of a group's settings."""
    assignments = [text.lstrip("+").partition("=") for text in overrides if "." in text.partition("=")[0]]
    if not assignments:
        return
    whole = _with_groups(config_name, overrides)
    for key, _, value in assignments:
        found = None if key.startswith(("~", "hydra.")) else OmegaConf.select(whole, key)
        if isinstance(found, DictConfig) and value != "null" and not value.startswith(("{", "${")):
            first = next((str(name) for name in found if not str(name).startswith("_")), "key")
            group = key.replace(".", "/") if (config_dir / key.replace(".", "/")).is_dir() else f"{key.partition('.')[0]}@{key}"
            raise UserError(
                f"'{key}' is a group of settings, not one value: set them one by one, as {key}.{first}=..., "
                f"or choose an option where there is one, as {group}=..."
            )


def _with_groups(config_name: str, overrides: list[str]) -> DictConfig:
    """The configuration with the chosen options of groups, before single keys are set; the default where these do not compose."""
    try:
        return compose(config_name, overrides=[text for text in overrides if "." not in text.partition("=")[0]])
    except (HydraException, OmegaConfBaseException):
        return compose(config_name)


def _explain(error: Exception, config_name: str, overrides: list[str], config_dir: Path) -> str:
    text = str(error)
    existing = re.search(r"already at '([^']+)'", text)
    if existing is not None:
        return f"the key '{existing.group(1)}' is there already: write it without '+'"
    found = re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", text) or re.search(
        r"Key '([^']+)' is not in struct", text
    )
    if found is None:
        return text.splitlines()[0] if text else f"the configuration cannot be read ({error.__cause__})"
    key = re.split(r"[@=]", found.group(1))[0]
    if (
        "/" in key and (config_dir / key).is_dir()
    ):  # the chosen option of the group has no such part, or has it under other names
        parts = _parts(config_name, [text for text in overrides if not text.startswith(key)], key)
        return f"'{key}' cannot be chosen here" + (f": write {' or '.join(f'{part}=...' for part in parts)}" if parts else "")
    keys = _flat_keys(OmegaConf.to_container(_with_groups(config_name, overrides), resolve=False))
    group, _, last = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in keys if name.rpartition(".")[0] == group]
    elsewhere = [name for name in keys if name.rpartition(".")[2] == last]
    owners = _options_with(config_name, config_dir, key) if group else []
    hint = (
        f"; {key.partition('.')[0]}={', '.join(owners)} {'have' if len(owners) > 1 else 'has'} it"
        if owners
        else nearest(last, siblings)
    )
    hint = hint or (f"; did you mean '{elsewhere[0]}'?" if elsewhere else "")
    where = f"under '{group}'" if group else "at the top"
    return f"unknown key '{key}'{hint}" + (f" (valid {where}: {', '.join(siblings)})" if siblings else "")


def _parts(config_name: str, overrides: list[str], group: str) -> list[str]:
    """The names under which the configuration takes an option of ``group``, as ``defense/schedule@defense.mmac``."""
    try:
        groups = [text for text in overrides if "." not in text.partition("=")[0]]
        choices = compose(config_name, overrides=groups, return_hydra_config=True).hydra.runtime.choices
    except (HydraException, OmegaConfBaseException):
        return []
    return sorted(str(name) for name in choices if str(name).startswith(f"{group}@"))


def _options_with(config_name: str, config_dir: Path, key: str) -> list[str]:
    """The options of the group that ``key`` begins with, with which the configuration has it."""
    group, nothing, found = key.partition(".")[0], object(), []
    for option in sorted(file.stem for file in (config_dir / group).glob("*.yaml")):
        try:
            config = compose(config_name, overrides=[f"{group}={option}"])
            if OmegaConf.select(config, key, default=nothing) is not nothing:
                found.append(option)
        except (HydraException, OmegaConfBaseException):
            continue
    return found


def _flat_keys(content: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in content.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _flat_keys(value, f"{prefix}{key}.")
    return keys
