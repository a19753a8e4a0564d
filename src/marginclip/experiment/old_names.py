"""Names of options that were changed: the old ones keep working for one release, with a warning."""

from __future__ import annotations

import re
import sys

SCHEDULES = {"near": "clean_starts", "warm": "warm_noise", "balanced": "last_activation", "balanced_paper": "mmom_paper"}


def with_new_names(arguments: list[str]) -> list[str]:
    """The arguments of a command line with today's names; warns on the standard error of each that was changed."""
    renamed = [_renamed(argument) for argument in arguments]
    for old, new in zip(arguments, renamed, strict=True):
        if old != new:
            print(
                f"warning: '{old}' has another name now: write '{new}'; the old one goes with the next release", file=sys.stderr
            )
    return renamed


def _renamed(argument: str) -> str:
    """One argument with today's names: ``defense.penalty.X`` is ``defense.lambda_.X``, schedules and loggers have names."""
    key, equals, value = argument.partition("=")
    if re.match(r"^[+~]*(defense|attack)\.", key):
        key = re.sub(r"\.penalty\.", ".lambda_.", key)
    if re.match(r"^[+~]*logger\.(mode|project|group)$", key):
        key = key.replace("logger.", "logger.wandb.")
    if re.match(r"^[+~]*defense/schedule(@.*)?$", key):
        value = re.sub(r"\w+", lambda word: SCHEDULES.get(word.group(), word.group()), value)
    return key + equals + value
