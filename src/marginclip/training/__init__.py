"""LightningModules that make a classifier."""

from marginclip.training.adaptive import AdaptiveTraining
from marginclip.training.adversarial import AdversarialTraining
from marginclip.training.classifier import ClassifierTraining
from marginclip.training.joint import JointTraining
from marginclip.training.poisoned import PoisonedTraining

__all__ = ["AdaptiveTraining", "AdversarialTraining", "ClassifierTraining", "JointTraining", "PoisonedTraining"]
