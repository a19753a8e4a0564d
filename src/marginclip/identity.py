"""What a setting identifies: the victim that is trained, the run, or nothing.

Victims and runs are found again by a digest of what they depend on. A setting is part of it unless its type says otherwise::

    def __init__(self, *, root: str, cache: Annotated[str | None, Identifies.NOTHING] = None)
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, get_args, get_origin, get_type_hints


class Identifies(Enum):
    """What changes with a setting: the trained ``VICTIM`` and so the run, the ``RUN`` alone, or ``NOTHING``."""

    VICTIM = "victim"
    RUN = "run"
    NOTHING = "nothing"

    def part_of(self, what: Identifies) -> bool:
        """Whether such a setting is part of the identity of ``what``, a victim or a run."""
        return self is Identifies.VICTIM or self is what


def declared(annotation: Any) -> Identifies:
    """What a type annotation says; the victim where it says nothing."""
    found = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((each for each in found if isinstance(each, Identifies)), Identifies.VICTIM)


def argument_types(target: Any) -> dict[str, Any]:
    """The annotations of everything that a class or function takes, through ``**settings`` to the base classes."""
    if not inspect.isclass(target):
        return get_type_hints(target, include_extras=True)
    found: dict[str, Any] = {}
    for base in target.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        found = get_type_hints(init, include_extras=True) | found
        if not any(each.kind == each.VAR_KEYWORD for each in inspect.signature(init).parameters.values()):
            break
    return found


def identifying_fields(value: Any, what: Identifies) -> dict[str, Any]:
    """The fields of a dataclass that are part of the identity of ``what``, by name."""
    hints = get_type_hints(type(value), include_extras=True)
    return {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if declared(hints[field.name]).part_of(what)
    }


def identifying_settings(settings: Any, what: Identifies, find: Callable[[str], Any]) -> Any:
    """Nested settings without those that are no part of the identity of ``what``.

    A victim does not depend on settings left at null, so that a new option leaves the victims of before alone; where null is not the
    default, it says something. ``find`` gives the class or function that a ``_target_`` names; its annotations decide about its
    settings.
    """
    if not isinstance(settings, Mapping):
        return list(settings) if isinstance(settings, (list, tuple)) else settings
    target = settings.get("_target_")
    made = find(target) if isinstance(target, str) else None
    hints, other_defaults = (known_types(made), _without_null_default(made)) if made is not None else ({}, set[str]())
    return {
        name: identifying_settings(value, what, find)
        for name, value in settings.items()
        if (value is not None or what is Identifies.RUN or name in other_defaults) and declared(hints.get(name)).part_of(what)
    }


def _without_null_default(target: Any) -> set[str]:
    """The arguments of a class or function that have a default, and another one than None."""
    try:
        taken = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {each.name for each in taken if each.default is not None and each.default is not each.empty}


def known_types(target: Any) -> dict[str, Any]:
    """:func:`argument_types`; none for a class of somebody else whose annotations cannot be resolved."""
    try:
        return argument_types(target)
    except (NameError, TypeError, AttributeError):
        return {}


def digest(content: Any) -> str:
    """Ten hexadecimal digits that are the same for equal plain content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]
