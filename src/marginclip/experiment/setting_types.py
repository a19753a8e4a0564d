"""Checking a configuration's values against the types of the constructor arguments that they become."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from marginclip.errors import UserError
from marginclip.identity import known_types

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}

LIBRARIES = ("torch", "torchvision", "lightning", "torchmetrics", "wandb", "hydra")


def check_types(settings: Any, key: str, find: Callable[[str], Any]) -> None:
    """Raise :class:`UserError` for a number, word or switch below ``key`` that its constructor does not take, and for NaN and infinity.

    Looks at every node with a ``_target_``, which ``find`` resolves, except those of libraries, whose annotations are often narrower
    than what they take. Arguments of other types than int, float, bool and str are left to the constructors.
    """
    if not isinstance(settings, dict):
        return
    target = settings.get("_target_")
    if isinstance(target, str) and target.split(".")[0] not in LIBRARIES:
        check_values(settings, key, known_types(find(target)))
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}.{name} must be a finite number, got {value!r}")
        check_types(value, f"{key}.{name}", find)


def check_values(settings: Mapping[str, Any], key: str, expected: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for a number, word or switch that does not fit its annotation in ``expected``, and for NaN and infinity."""
    for name, value in settings.items():
        allowed = _simple(expected.get(name))
        if allowed and not _fits(value, allowed):
            wanted = " or ".join(WORDS[kind] for kind in allowed)
            raise UserError(f"{key}.{name} must be {wanted}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}.{name} must be a finite number, got {value!r}")


def _simple(annotation: Any) -> tuple[type, ...]:
    """The allowed types where all of them are in ``WORDS``, else none."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(kinds) if all(isinstance(kind, type) and kind in WORDS for kind in kinds) else ()


def _fits(value: Any, allowed: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return int in allowed or float in allowed
    return isinstance(value, allowed)
