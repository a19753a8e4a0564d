"""Finding mistakes in a command line's overrides before anything runs, and what to write instead."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from marginclip.errors import UserError, nearest

# Launchers of sweeps -> the Hydra plugin that brings them, and our extra that installs it.
LAUNCHERS = {
    "joblib": ("joblib", "sweeps"),
    "processes": ("joblib", "sweeps"),
    "slurm": ("submitit", "slurm"),
    "submitit_local": ("submitit", "slurm"),
    "submitit_slurm": ("submitit", "slurm"),
    "ray": ("ray", "ray"),
    "ray_cluster": ("ray", "ray"),
}

# Groups that a command has for its configuration to be whole, and that nothing it does depends on.
UNUSED = {
    "audit": ("attack", "x2x", "training", "imbalance", "logger"),
    "repair": ("attack", "x2x", "training", "imbalance", "logger", "detect"),
}


@dataclass(frozen=True)
class OptionFolders:
    """The folders that options are in; an option of an earlier one stands in the place of a later one's of the same name."""

    folders: tuple[Path, ...]

    @contextmanager
    def composing(self) -> Iterator[None]:
        """Inside, Hydra's ``compose`` looks in these folders."""
        before = get_gh_backup()
        version.setbase("1.3")
        search_path = create_config_search_path(str(self.folders[0]))
        for folder in self.folders[1:]:
            search_path.prepend("marginclip", f"file://{folder}", anchor="schema")
        Hydra.create_main_hydra2(task_name="marginclip", config_search_path=search_path)
        try:
            yield
        finally:
            restore_gh_from_backup(before)

    def options(self, group: str) -> list[str]:
        """The names of a group's options."""
        return sorted({file.stem for folder in self.folders for file in (folder / group).glob("*.yaml")})

    def is_group(self, name: str) -> bool:
        """Whether there is such a group, written with slashes."""
        return any((folder / name).is_dir() for folder in self.folders)

    def mention(self, key: str) -> bool:
        """Whether any option writes a key of this name."""
        return any(f"{key}:" in file.read_text(errors="ignore") for folder in self.folders for file in folder.rglob("*.yaml"))


def check_overrides(overrides: list[str], config_name: str, config_dir: Path, own: Path | None = None) -> None:
    """Compose the configuration for every choice of a sweep; raises :class:`UserError` naming the nearest valid option or key."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        bad = next((text for text in overrides if "=" not in text and not text.startswith("~")), None)
        if bad is not None:
            raise UserError(f"'{bad}' is not an option: options are written key=value, for example attack=badnet") from error
        raise UserError(f"the options cannot be read: {str(error).splitlines()[0]}") from error
    folders = OptionFolders(tuple(folder.resolve() for folder in (own, config_dir) if folder is not None))
    with folders.composing():
        seen: set[str] = set()
        for variant in _variants(parsed, folders):
            hydra = _check_variant(variant, config_name, folders)
            _refuse_swept_sweeps(parsed, variant, hydra)
            experiment = next((text for text in variant if text.startswith("experiment=")), None)
            if experiment is not None and experiment not in seen:
                seen.add(experiment)
                for swept in _variants(_swept_by(hydra, variant), folders):
                    if swept:
                        _check_variant(swept + variant, config_name, folders)


def _check_variant(variant: list[str], config_name: str, folders: OptionFolders) -> DictConfig:
    """Raises :class:`UserError` where the command line cannot be run; returns Hydra's own settings for it."""
    _refuse_missing_launcher(variant)
    _refuse_missing_groups(variant, folders)
    _refuse_unused_groups(variant, config_name)
    _refuse_training_of_a_given_model(variant)
    config, hydra = _compose(variant, config_name, folders)
    _refuse_unusable_folder(Path(str(config.runs_dir)))
    _refuse_replaced_groups(variant, config_name, folders)
    return hydra


def plugin_installed(plugin: str) -> bool:
    """Whether Hydra's launcher plugin of that name is installed."""
    names = ("hydra_plugins", f"hydra_plugins.hydra_{plugin}_launcher")  # without the first, asking for the second raises
    return all(importlib.util.find_spec(name) is not None for name in names)


def _refuse_missing_launcher(overrides: list[str]) -> None:
    for text in overrides:
        key, _, option = text.partition("=")
        if key == "hydra/launcher" and option in LAUNCHERS:
            plugin, extra = LAUNCHERS[option]
            if not plugin_installed(plugin):
                raise UserError(f"hydra/launcher={option} is not installed: pip install 'marginclip[{extra}]'")


def _refuse_unusable_folder(runs_dir: Path) -> None:
    """Refuse a ``runs_dir`` that cannot be made or written to: Hydra makes it before any of our code runs."""
    there = next(folder for folder in (runs_dir.absolute(), *runs_dir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"runs_dir='{runs_dir}' cannot be used: '{there}' is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"runs_dir='{runs_dir}' cannot be used: '{there}' cannot be written to")


def _swept_by(hydra: DictConfig, variant: list[str]) -> list[Override]:
    """What the experiment sweeps by itself, where the command line does not say otherwise."""
    params = (hydra.sweeper.params or {}) if hydra.mode == RunMode.MULTIRUN else {}
    given = {text.lstrip("+").partition("=")[0] for text in variant}
    return OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items() if key not in given])


def _variants(parsed: list[Override], folders: OptionFolders) -> Iterator[list[str]]:
    """Override lists without sweeps: every choice of every sweep appears in at least one, but plain values after a plain one."""
    choices = [_choices(override) for override in parsed]
    yield [options[0] for options in choices]
    for position, options in enumerate(choices):
        alike = _is_plain(options[0], folders)
        for option in options[1:]:
            if not (alike and _is_plain(option, folders)):
                yield [option if index == position else other[0] for index, other in enumerate(choices)]


def _is_plain(text: str, folders: OptionFolders) -> bool:
    """Whether an override gives a key a word or number, so that another one in its place composes as well."""
    key, _, value = text.partition("=")
    word = re.fullmatch(r"[\w.+-]+", value) is not None and value != "null"
    return word and key != "runs_dir" and "/" not in key and "@" not in key and not folders.is_group(key)


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line or ""]
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        raise UserError(
            f"'{override.input_line}' is an interval: list the values to run, as {key}=0,1, or write {key}=range(0,3)"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _compose(overrides: list[str], config_name: str, folders: OptionFolders) -> tuple[DictConfig, DictConfig]:
    """The configuration, and Hydra's own settings."""
    try:
        given = [text for text in overrides if not text.startswith("hydra.")]
        config = compose(config_name, overrides=given, return_hydra_config=True)
        with open_dict(config):
            hydra = config.pop("hydra")
        OmegaConf.to_container(config, resolve=True)
        return config, hydra
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        options = list(error.options or [])
        raise UserError(
            f"unknown option {group}={option}{nearest(option, options)} (there are {', '.join(sorted(options))})"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, config_name, overrides, folders)) from error


def _refuse_missing_groups(overrides: list[str], folders: OptionFolders) -> None:
    """Refuse ``defense=null`` and ``~defense``: a run has one option of every group at the top."""
    for text in overrides:
        key, _, value = text.lstrip("~+").partition("=")
        options = folders.options(key) if not {".", "/"} & {*key} and key != "experiment" else []
        if options and (text.startswith("~") or value in ("null", "")):
            hint = f"use {key}=none" if "none" in options else f"there are {', '.join(options)}"
            raise UserError(f"'{text}' leaves the run without {key}; {hint}")


def _refuse_swept_sweeps(parsed: list[Override], variant: list[str], hydra: DictConfig) -> None:
    """Refuse a sweep over experiments that sweep by themselves: Hydra would run one cell of each."""
    swept = next((each for each in parsed if each.key_or_group == "experiment" and each.is_sweep_override()), None)
    if swept is not None and hydra.sweeper.params:
        one = next(text for text in variant if text.startswith("experiment="))
        raise UserError(f"'{swept.input_line}': {one} is a sweep of its own; run one experiment after the other")


def _refuse_training_of_a_given_model(overrides: list[str]) -> None:
    """Refuse ``training.epochs=10`` beside ``victim=checkpoint``, which trains nothing."""
    if "victim=checkpoint" in overrides:
        for text in overrides:
            if re.split("[./@=]", text.lstrip("+~"))[0] == "training":
                raise UserError(f"'{text}' has no effect: victim=checkpoint trains nothing; leave it out")


def _refuse_unused_groups(overrides: list[str], command: str) -> None:
    """Refuse ``attack=badnet`` for a command that attacks nothing, but not ``attack=none``."""
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        group = re.split("[./@]", key)[0]
        if group in UNUSED.get(command, ()) and value != "none":
            raise UserError(f"'{text}' has no effect: marginclip {command} does not use {group}; leave it out")


def _refuse_replaced_groups(overrides: list[str], config_name: str, folders: OptionFolders) -> None:
    """Refuse ``defense.detector=paper``, which would put a word in the place of a group's settings."""
    assignments = [text.lstrip("+").partition("=") for text in overrides if "." in text.partition("=")[0]]
    if not assignments:
        return
    about = {"experiment", *(re.split("[./]", key)[0] for key, _, _ in assignments)}  # what other groups are set to has no say
    chosen = [text for text in overrides if re.split("[./@=]", text.lstrip("+"))[0] in about]
    whole = _with_groups(config_name, chosen, folders)
    for key, _, value in assignments:
        found = None if key.startswith(("~", "hydra.")) else OmegaConf.select(whole, key)
        if isinstance(found, DictConfig) and value != "null" and not value.startswith(("{", "${")):
            first = next((str(name) for name in found if not str(name).startswith("_")), "key")
            group = key.replace(".", "/") if folders.is_group(key.replace(".", "/")) else f"{key.partition('.')[0]}@{key}"
            raise UserError(
                f"'{key}' is a group of settings, not one value: set them one by one, as {key}.{first}=..., "
                f"or choose an option where there is one, as {group}=..."
            )


def _with_groups(config_name: str, overrides: list[str], folders: OptionFolders) -> DictConfig:
    """The configuration with the chosen options of groups, before single keys are set; the default where these do not compose."""
    names = ((text, re.split("[@=]", text.lstrip("+"))[0]) for text in overrides)
    return _of_groups(config_name, tuple(text for text, name in names if folders.is_group(name)), folders)


@lru_cache(maxsize=64)  # the same ones are asked for at every choice of a sweep
def _of_groups(config_name: str, groups: tuple[str, ...], folders: OptionFolders) -> DictConfig:
    del folders  # where Hydra looks: the cache has to know
    try:
        return compose(config_name, overrides=list(groups))
    except (HydraException, OmegaConfBaseException):
        return compose(config_name)


def _explain(error: Exception, config_name: str, overrides: list[str], folders: OptionFolders) -> str:
    text = str(error)
    kept = _kept_although_deleted(text, config_name, overrides, folders)
    if kept is not None:
        return kept
    existing = re.search(r"already at '([^']+)'", text)
    if existing is not None:
        return f"the key '{existing.group(1)}' is there already: write it without '+'"
    found = re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", text) or re.search(
        r"Key '([^']+)' is not in struct", text
    )
    if found is None:
        return text.splitlines()[0] if text else f"the configuration cannot be read ({error.__cause__})"
    key = re.split(r"[@=]", found.group(1))[0]
    if "/" in key and folders.is_group(key):  # the chosen option of the group has no such part, or has it under other names
        parts = _parts(config_name, [text for text in overrides if not text.startswith(key)], key)
        return f"'{key}' cannot be chosen here" + (f": write {' or '.join(f'{part}=...' for part in parts)}" if parts else "")
    keys = _flat_keys(OmegaConf.to_container(_with_groups(config_name, overrides, folders), resolve=False))
    group, _, last = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in keys if name.rpartition(".")[0] == group]
    elsewhere = [name for name in keys if name.rpartition(".")[2] == last]
    owners = _options_with(config_name, folders, key) if group else []
    hint = (
        f"; {key.partition('.')[0]}={', '.join(owners)} {'have' if len(owners) > 1 else 'has'} it"
        if owners
        else nearest(last, siblings)
    )
    hint = hint or (f"; did you mean '{elsewhere[0]}'?" if elsewhere else "")
    where = f"under '{group}'" if group else "at the top"
    return f"unknown key '{key}'{hint}" + (f" (valid {where}: {', '.join(siblings)})" if siblings else "")


def _kept_although_deleted(text: str, config_name: str, overrides: list[str], folders: OptionFolders) -> str | None:
    """What to say of ``~key`` for a key that is there: it is null already, or has another value than the one to delete."""
    found = re.search(r"Could not delete[^']*'([^']+)'", text)
    if found is None:
        return None
    key = found.group(1).partition("=")[0]
    group, _, last = key.rpartition(".")
    config = _with_groups(config_name, overrides, folders)
    node = OmegaConf.select(config, group) if group else config
    if not isinstance(node, DictConfig) or last not in node:
        return None
    asked = next((text for text in overrides if text.startswith("~") and text[1:].partition("=")[0] == key), f"~{key}")
    if node[last] is None:
        return f"'{key}' is null already, which is as good as deleted: leave '{asked}' away"
    return f"'{key}' is {node[last]}, not {asked.partition('=')[2]}: '~{key}' deletes it whatever it is"


def _parts(config_name: str, overrides: list[str], group: str) -> list[str]:
    """The names under which the configuration takes an option of ``group``, as ``defense/schedule@defense.mmac``."""
    try:
        groups = [text for text in overrides if "." not in text.partition("=")[0]]
        choices = compose(config_name, overrides=groups, return_hydra_config=True).hydra.runtime.choices
    except (HydraException, OmegaConfBaseException):
        return []
    return sorted(str(name) for name in choices if str(name).startswith(f"{group}@"))


def _options_with(config_name: str, folders: OptionFolders, key: str) -> list[str]:
    """The options of the group that ``key`` begins with, with which the configuration has it."""
    group, nothing, found = key.partition(".")[0], object(), []
    if not folders.mention(key.rpartition(".")[2]):  # most are misspelt: no option needs to be composed
        return []
    for option in folders.options(group):
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
