"""Checking a configuration's values against the types of the constructor arguments that they become."""

from __future__ import annotations

import inspect
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from marginclip.errors import UserError

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def check_types(config: Any, key: str) -> None:
    """Raise :class:`UserError` for a number, word or switch below ``key`` that its constructor does not take.

    Looks at every node of ours with a ``_target_``; arguments of other types than int, float, bool and str are left to the constructors.
    """
    if not isinstance(config, dict):
        return
    target = config.get("_target_")
    if isinstance(target, str) and target.startswith("marginclip."):
        expected = argument_types(get_object(target))
        for name, value in config.items():
            allowed = _simple(expected.get(name))
            if allowed and not _fits(value, allowed):
                wanted = " or ".join(WORDS[kind] for kind in allowed)
                raise UserError(f"{key}.{name} must be {wanted}, got {value!r}")
    for name, value in config.items():
        check_types(value, f"{key}.{name}")


def argument_types(target: Any) -> dict[str, Any]:
    """The annotated types of everything that a class or function takes, through ``**settings`` to the base classes."""
    if not inspect.isclass(target):
        return get_type_hints(target)
    found: dict[str, Any] = {}
    for base in target.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        found = get_type_hints(init) | found
        if not any(each.kind == each.VAR_KEYWORD for each in inspect.signature(init).parameters.values()):
            break
    return found


def _simple(annotation: Any) -> tuple[type, ...]:
    """The allowed types where all of them are in ``WORDS``, else none."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(kinds) if all(isinstance(kind, type) and kind in WORDS for kind in kinds) else ()


def _fits(value: Any, allowed: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return int in allowed or float in allowed
    return isinstance(value, allowed)
