"""LightningModules that make a classifier."""

from marginclip.training.classifier import ClassifierTraining
from marginclip.training.poisoned import PoisonedTraining

__all__ = ["ClassifierTraining", "PoisonedTraining"]
