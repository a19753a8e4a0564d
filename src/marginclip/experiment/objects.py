"""Objects from the settings that name them: the only use of Hydra behind the entry."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

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


def make_model(settings: Mapping[str, Any], *, num_classes: int, in_channels: int) -> nn.Module:
    """The network of plain ``settings``; ``num_classes`` and ``in_channels`` are given to a target that takes arguments of these names.

    A target that hands unnamed arguments on, such as ``torchvision.models.resnet18``, is given ``num_classes``, and ``in_channels`` where
    it is not the usual 3.
    """
    target = find_object(str(settings["_target_"]), "model")
    taken = arguments_of(target)
    if hands_on(target):
        taken |= {"num_classes"} if in_channels == 3 else {"num_classes", "in_channels"}
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    model: nn.Module = make(settings, key="model", **{name: size for name, size in sizes.items() if name in taken})
    return model


def arguments_of(target: Any) -> set[str]:
    """The names of the arguments of a function or class, those of its base classes among them where it hands others on."""
    names = set[str]()
    for parameters in _signatures(target):
        names |= {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    return names


def hands_on(target: Any) -> bool:
    """Whether the last in line takes arguments that nobody names: ``**kwargs`` of a function, or of a class without a further base."""
    signatures = _signatures(target)
    return bool(signatures) and any(each.kind is each.VAR_KEYWORD for each in signatures[-1])


def _signatures(target: Any) -> list[list[inspect.Parameter]]:
    """The parameters of a function; of a class, also those of its bases, as far as each constructor hands unnamed ones on."""
    constructors = (
        [vars(base)["__init__"] for base in target.__mro__ if base not in (nn.Module, object) and "__init__" in vars(base)]
        if inspect.isclass(target)
        else [target]
    )
    found: list[list[inspect.Parameter]] = []
    for constructor in constructors:
        try:
            found.append(list(inspect.signature(constructor).parameters.values()))
        except (TypeError, ValueError):  # made in C: it does not say
            break
        if not any(each.kind is each.VAR_KEYWORD for each in found[-1]):
            break
    return found


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
