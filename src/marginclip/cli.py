"""The command ``marginclip``: its subcommands, and what answers at once without importing anything heavy."""

from __future__ import annotations

import sys
from pathlib import Path

from marginclip import __version__
from marginclip.errors import nearest

CONF = Path(__file__).parent / "conf"
USAGE = """marginclip repairs image classifiers that were poisoned or trained on imbalanced data, without their training set.

  marginclip defend ...   obtain a victim, repair it, and measure both: marginclip defend attack=badnet defense=mmdf
  marginclip train ...    only make a victim: marginclip train attack=badnet
  marginclip report DIR   summarise all runs below a folder
  marginclip --version

Options of defend and train are written key=value; -m runs every combination of a sweep (attack=badnet,blend).
--config-dir DIR adds a folder with options of your own. marginclip defend --help lists all options.
"""
COMMANDS = ("defend", "train", "report")


def main(arguments: list[str] | None = None) -> None:
    """Run ``marginclip`` with these arguments, by default those of the command line; exits with 1 after a mistake."""
    given = sys.argv[1:] if arguments is None else arguments
    command, rest = (given[0], given[1:]) if given else ("--help", [])
    if command in ("--help", "-h"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"marginclip {__version__}")
    elif command == "report":
        from marginclip.reporting.__main__ import main as report

        sys.exit(report(rest))
    elif command in ("defend", "train"):
        _run_with_hydra(command, rest)
    else:
        sys.exit(f"error: unknown command '{command}'{nearest(command, COMMANDS)} (there are {', '.join(COMMANDS)})")


def _run_with_hydra(command: str, arguments: list[str]) -> None:
    from marginclip.experiment import command as hydra_command
    from marginclip.experiment.old_names import with_new_names

    sys.path.insert(0, str(Path.cwd()))  # the user's own modules; a console script does not look there
    sys.argv = [f"marginclip {command}", *with_new_names(arguments)]
    hydra_command.command_line(command, CONF)
