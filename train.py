"""Make a victim: train a (poisoned) classifier, test it and put it into the store: python train.py attack=badnet"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from marginclip.experiment.command import command_line, run_job


def task(config: DictConfig) -> Path:
    """Train the victim, or find it trained; returns its record."""
    from marginclip.experiment.building import build_setup
    from marginclip.experiment.process import prepare_process
    from marginclip.experiment.victim import obtain_victim

    prepare_process(config)
    victim, _ = obtain_victim(config, build_setup(config))
    return victim.folder / "victim.json"


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def run(config: DictConfig) -> None:
    run_job(config, task)


if __name__ == "__main__":
    command_line(run, "train", Path(__file__).parent / "conf")
