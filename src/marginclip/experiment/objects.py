"""Objects from the settings that name them: the only use of Hydra behind the entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException

from marginclip.errors import UserError, first_line, require
from marginclip.experiment.setting_types import check_types


def find_object(target: str, key: str) -> Any:
    """The class or function that ``key._target_`` names; raises :class:`UserError` where there is none."""
    try:
        found = get_object(target)
    except Exception as error:  # whatever a user's own module raises when it is imported
        raise UserError(f"{key}._target_='{target}' cannot be imported ({first_line(error.__cause__ or error)})") from error
    require(callable(found), f"{key}._target_='{target}' must name a class or a function")
    return found


def make(settings: Mapping[str, Any], *positional: Any, key: str, **objects: Any) -> Any:
    """The object of plain ``settings`` with a ``_target_``; failures name the configuration ``key`` and, for a user's mistake, no more.

    ``objects`` are further arguments. The entry ``name`` of nested groups is their label, no argument.
    """
    plain = without_names(settings)
    for target in _targets(plain):
        find_object(target, key)
    check_types(plain, key, lambda target: find_object(target, key))
    try:
        return instantiate(plain, *positional, **objects)
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        reason = error.__cause__ or error
        if isinstance(reason, (TypeError, ValueError, LookupError, OSError, MisconfigurationException)):
            raise UserError(f"{key}: {first_line(reason)}") from error
        raise


def without_names(settings: Any) -> Any:
    """The settings, as dictionaries, without the entry ``name`` of the groups in them."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: without_names(value) for name, value in settings.items() if name != "name"}


def _targets(settings: Any) -> list[str]:
    """Every ``_target_`` at any depth."""
    if not isinstance(settings, Mapping):
        return []
    own = [settings["_target_"]] if isinstance(settings.get("_target_"), str) else []
    return own + [target for value in settings.values() for target in _targets(value)]
