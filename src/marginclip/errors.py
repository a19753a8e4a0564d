"""The one exception that means "the user can fix this": the entry points print its message and no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user gave a setting, file or model that cannot be used. The message names it, the value found and what is allowed.

    It is a ``ValueError``. The command line prints its message alone and exits with 1.

    Examples:
        >>> require(0 < 5 <= 1, "attack.rate must be in (0, 1], got 5; did you mean 0.05?")
        Traceback (most recent call last):
        marginclip.errors.UserError: attack.rate must be in (0, 1], got 5; did you mean 0.05?
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ``"; did you mean 'badnet'?"``, or the empty string when nothing valid is close to ``name``.

    >>> nearest("badnett", ["badnet", "blend"])
    "; did you mean 'badnet'?"
    """
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its kind where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """``text`` on one line, with what a terminal would act on written as an escape: names of files can hold anything."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)
