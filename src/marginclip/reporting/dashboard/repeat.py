"""The command that does a run again, from its record alone."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from marginclip.record import RunRecord

CONF = Path(__file__).parents[2] / "conf"
GROUPS = (
    "dataset",
    "attack",
    "x2x",
    "model",
    "training",
    "imbalance",
    "loss",
    "victim",
    "detect",
    "defense",
    "trainer",
    "logger",
)
PARTS = {"defense": ("schedule", "detector")}
WORD = re.compile(r"[A-Za-z_/][\w./-]*")
Leaves = dict[tuple[str, ...], Any]
NOT_WORDS = ("null", "true", "false", "nan", "inf")


def repeat_command(record: RunRecord) -> str:
    """``marginclip defend`` with the option of every group, and every setting that the options' own files do not give.

    The folder of the runs is left to whoever repeats it. An option of the user's own, which is not in the package, is named with all
    its settings; the command then needs the user's ``--config-dir``.
    """
    words: list[str] = []
    settings: list[str] = []
    for group in GROUPS:
        content = record.config.get(group)
        if not isinstance(content, dict):
            continue
        option, given = _option(group, content)
        parts, of_parts = _parts(group, option, content)
        words += [f"{group}={option}", *parts]
        settings += [
            f"++{group}.{'.'.join(path)}={literal(value)}"
            for path, value in leaves(content).items()
            if path and not _same((given | of_parts).get(path, ...), value)
        ]
    plain = {
        key: value for key, value in record.config.items() if key not in (*GROUPS, "runs_dir") and not isinstance(value, dict)
    }
    top = [f"{key}={literal(value)}" for key, value in plain.items()]
    return " ".join(["marginclip", "defend", *(shlex.quote(word) for word in [*words, *top, *settings])])


def leaves(value: Any, path: tuple[str, ...] = ()) -> Leaves:
    """The settings of nested content that are no mapping, or an empty one, by their keys from the outside in."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {key: leaf for name, entry in value.items() for key, leaf in leaves(entry, (*path, str(name))).items()}


def literal(value: Any) -> str:
    """A value as Hydra's grammar of the command line has it."""
    if isinstance(value, str):
        plain = WORD.fullmatch(value) and value.lower() not in NOT_WORDS
        return (
            value
            if plain
            else "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (r"\'" if found[2] else ""), value) + "'"
        )
    if isinstance(value, list):
        return "[" + ",".join(literal(entry) for entry in value) + "]"
    return "{}" if value == {} else json.dumps(value)


def _option(group: str, content: dict[str, Any]) -> tuple[str, Leaves]:
    """The option of a group that was chosen, by its name, else the one that gives most of the settings, and what its file gives."""
    files = {path.stem: _given(path) for path in sorted((CONF / group).glob("*.yaml"))}
    name = content.get("name", content.get("kind"))
    if isinstance(name, str) and name in files and files[name].get(("_target_",)) == content.get("_target_"):
        return name, files[name]
    alike = {stem: given for stem, given in files.items() if given.get(("_target_",)) == content.get("_target_")}
    if not alike:
        return str(name), {}
    return max(alike.items(), key=lambda item: _agreement(item[1], content))


def _parts(group: str, option: str, content: dict[str, Any]) -> tuple[list[str], Leaves]:
    """The options of the groups within a group, where its file names such, and what their files give."""
    words: list[str] = []
    found: Leaves = {}
    named = _defaults(group, option)
    for part in PARTS.get(group, ()):
        if part not in named:
            continue
        prefix = () if part == "schedule" else (part,)
        files = {path.stem: _given(path, prefix) for path in sorted((CONF / group / part).glob("*.yaml"))}
        chosen = max(files, key=lambda stem: (_agreement(files[stem], content), stem == named[part]))
        if chosen != named[part]:
            words.append(f"{group}/{part}={chosen}")
        found |= files[chosen]
    return words, found


@cache
def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


@cache
def _given(path: Path, prefix: tuple[str, ...] = ()) -> Leaves:
    """What an option's own file gives, of its group alone."""
    content = {key: value for key, value in _read(path).items() if key != "defaults"}
    if path.read_text(encoding="utf-8").startswith("# @package _global_"):
        content = content.get(path.parent.name, {})
    return {(*prefix, *key): value for key, value in leaves(content).items() if key}


def _defaults(group: str, option: str) -> dict[str, str]:
    """The groups that an option's file names in its list of defaults, with their options; a name can be any text, so none is a path."""
    path = next((path for path in (CONF / group).glob("*.yaml") if path.stem == option), None)
    entries = [] if path is None else _read(path).get("defaults", [])
    return {str(group): str(option) for entry in entries if isinstance(entry, dict) for group, option in entry.items()}


def _agreement(given: Leaves, content: dict[str, Any]) -> int:
    """How many settings agree, less those of the file that do not."""
    found = leaves(content)
    same = sum(_same(found.get(key, ...), value) for key, value in given.items())
    return 2 * same - len(given)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other
