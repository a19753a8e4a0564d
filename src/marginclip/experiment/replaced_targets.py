"""``group._target_=...`` on the command line: the option's settings that the other class does not take are left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from marginclip.experiment.objects import arguments_of, find_object

log = logging.getLogger(__name__)
# Keys for the code around the objects of groups.
LABELS = ("_target_", "_partial_", "_args_", "name", "augment", "detector", "repaired_row", "detector_row")


def fit_to_targets(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``content`` without the settings that a ``_target_`` of the ``overrides`` does not take, but those that they set themselves.

    The trainer is left as it is: its settings are read by the run itself. Raises :class:`UserError` for a target that is not there.
    """
    given = dict(text.lstrip("+").partition("=")[::2] for text in overrides if not text.startswith("~"))
    fitted = dict(content)
    for key in given:
        path = key.split(".")
        if path[-1] == "_target_" and len(path) > 1 and path[0] != "trainer":
            fitted = _fitted(fitted, path[:-1], ".".join(path[:-1]), given)
    return fitted


def _fitted(content: Mapping[str, Any], path: Sequence[str], key: str, given: Mapping[str, str]) -> dict[str, Any]:
    if path:
        inner = content.get(path[0])
        return {**content, path[0]: _fitted(inner, path[1:], key, given)} if isinstance(inner, Mapping) else dict(content)
    target = content.get("_target_")
    if not isinstance(target, str):
        return dict(content)
    taken = arguments_of(find_object(target, key))
    own = [name for name in content if any(word == f"{key}.{name}" or word.startswith(f"{key}.{name}.") for word in given)]
    others = [name for name in content if name not in (*taken, *LABELS, *own)]
    if others:
        log.warning(
            "%s._target_=%s does not take %s: these settings of the option are left out", key, target, ", ".join(others)
        )
    return {name: value for name, value in content.items() if name not in others}
