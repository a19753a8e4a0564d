"""Make a victim: train a (poisoned) classifier, test it and put it into the store: python train.py attack=badnet"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from marginclip.experiment.command import command_line, run_job


def task(spec: Any) -> str:
    """Train the victim, or find it trained; returns its record."""
    from marginclip.experiment.run import train

    return train(spec)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def run(config: DictConfig) -> None:
    run_job(config, task)


if __name__ == "__main__":
    command_line(run, "train", Path(__file__).parent / "conf")
