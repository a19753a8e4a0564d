"""Repair a backdoored classifier and detect its triggers: python defend.py attack=badnet defense=mmdf"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from marginclip.experiment.command import command_line, run_job


def task(spec: Any) -> str:
    """One run: the victim (found, or trained first), its repair, the table, the record."""
    from marginclip.experiment.run import defend
    from marginclip.reporting import print_table

    record = defend(spec)
    print_table(record)
    return str(record.path)


@hydra.main(version_base="1.3", config_path="conf", config_name="defend")
def run(config: DictConfig) -> None:
    run_job(config, task)


if __name__ == "__main__":
    command_line(run, "defend", Path(__file__).parent / "conf")
