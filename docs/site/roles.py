"""Docstrings name other objects by roles, ``:class:`~marginclip.MMAC```; the site shows their names as code."""

from __future__ import annotations

import re

from griffe import Extension, Object

ROLE = re.compile(r":\w+:`~?([\w.]+)`")


class Roles(Extension):
    """Replaces every role by the last part of its name."""

    def on_instance(self, *, obj: Object, **kwargs) -> None:
        """Rewrite the docstring of an object that was just read."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", obj.docstring.value)
