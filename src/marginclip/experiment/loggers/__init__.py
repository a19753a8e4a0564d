"""Experiment loggers: where curves and results go beside the record. ``logger=[wandb,csv]`` takes several at once."""

from marginclip.experiment.loggers.base import Destination, RunLoggers, opened_loggers

__all__ = ["Destination", "RunLoggers", "opened_loggers"]
