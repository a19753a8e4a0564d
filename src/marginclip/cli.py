"""The command ``marginclip``: its subcommands, and what answers at once without importing anything heavy."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from marginclip import __version__
from marginclip.errors import nearest
from marginclip.signals import told_endings

CONF = Path(__file__).parent / "conf"
USAGE = """marginclip repairs image classifiers that were poisoned or trained on imbalanced data, without their training set.

  marginclip defend ...   train or load a model, repair it, and measure both: marginclip defend attack=badnet defense=mmdf
  marginclip train ...    only train a model to repair: marginclip train attack=badnet
  marginclip report DIR   summarise all runs below a folder; --html DIR_OR_FILE writes a dashboard that opens offline
  marginclip status DIR   show which sweeps and runs below a folder are done, running, failed or missing, and why
  marginclip dashboard --entity E --project P   make a W&B workspace and a report of your runs

With a model that somebody handed you, and a folder of clean images with one sub-folder a class:
  marginclip audit ...    name its faults: marginclip audit victim.path=model.safetensors model=resnet18 dataset.root=clean/ output=DIR
  marginclip repair ...   write an artefact, a folder with the bounds and the detector; takes the options of audit
  marginclip scan DIR IMAGES...   decide about images with the artefact DIR: a row each, with corrected decision and p-value
  marginclip export DIR format=onnx output=FILE   write the repaired model as one graph
  marginclip --version

Write the options of defend, train, audit and repair as key=value. -m runs every combination of a sweep (attack=badnet,blend).
--config-dir DIR adds a folder with options of your own. marginclip defend --help lists all options.
To complete options in this shell: eval "$(marginclip defend -sc install=bash)"
"""
WITH_HYDRA = ("defend", "train", "audit", "repair")
COMMANDS = (*WITH_HYDRA, "scan", "export", "report", "status", "dashboard")
# Flags of audit and repair that are options underneath.
FLAGS = {"--json": "json=true", "--images-suspect": "images_suspect="}


def main(arguments: list[str] | None = None) -> None:
    """Run ``marginclip`` with these arguments, by default those of the command line; exits with 1 after a mistake."""
    given = sys.argv[1:] if arguments is None else arguments
    command = given[0] if given else "--help"
    goes_on = command in ("defend", "train")
    with told_endings("the same command goes on from the last checkpoint" if goes_on else "no file was left half written"):
        _run(command, given)


def _run(command: str, given: list[str]) -> None:
    rest = given[1:]
    if command in ("--help", "-h"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"marginclip {__version__}")
    elif command == "report":
        from marginclip.reporting.__main__ import main as report

        sys.exit(report(rest))
    elif command in WITH_HYDRA:
        _run_with_hydra(command, _as_options(rest) if command in ("audit", "repair") else rest)
    elif command == "status":
        from marginclip.experiment.status import main as status

        sys.exit(status(rest))
    elif command == "dashboard":
        from marginclip.experiment.dashboard import main as dashboard

        sys.exit(dashboard(rest))
    elif command in ("scan", "export"):
        from marginclip.experiment import artefact_commands

        sys.exit(artefact_commands.main(command, rest))
    elif command in ("-sc", "--shell_completion"):
        _complete(given)
    else:
        sys.exit(f"error: unknown command '{command}'{nearest(command, COMMANDS)} (there are {', '.join(COMMANDS)})")


def _complete(arguments: list[str]) -> None:
    """Answer the shell, which asks ``marginclip`` without its subcommand and has the line so far in COMP_LINE."""
    line = os.environ.get("COMP_LINE", "marginclip defend ")
    _, *typed = line.split()
    if not typed or (len(typed) == 1 and not line.endswith(" ")):
        print(" ".join(command for command in COMMANDS if command.startswith("".join(typed))))
    elif typed[0] in WITH_HYDRA:
        os.environ["COMP_LINE"] = re.sub(rf"^(\s*\S+)\s+{typed[0]}", r"\1", line, count=1)  # as Hydra expects it
        _run_with_hydra(typed[0], arguments)


def _as_options(arguments: list[str]) -> list[str]:
    """The arguments with flags written as options: ``--images-suspect DIR`` and ``--images-suspect=DIR`` alike."""
    found: list[str] = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if found and found[-1] == FLAGS["--images-suspect"]:
            found[-1] += word
        elif name in FLAGS:
            found.append(FLAGS[name] + (value if equals else ""))
        else:
            found.append(word)
    return found


def _run_with_hydra(command: str, arguments: list[str]) -> None:
    from marginclip.experiment import command as hydra_command
    from marginclip.experiment.old_names import with_new_names

    sys.path.append(str(Path.cwd()))  # the user's own modules: a console script does not look there
    sys.argv = ["marginclip", *with_new_names(arguments)]
    hydra_command.command_line(command, CONF)
