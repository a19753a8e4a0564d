"""LightningModules that make a classifier."""

from marginclip.training.adaptive import AdaptiveTraining
from marginclip.training.adversarial import AdversarialTraining
from marginclip.training.classifier import ClassifierTraining
from marginclip.training.head import HeadTraining
from marginclip.training.joint import JointTraining
from marginclip.training.long_tail import LongTailTraining
from marginclip.training.poisoned import PoisonedTraining
from marginclip.training.replay import CudaGraphs
from marginclip.training.schedules import WarmUpAndDrops, cosine_to_zero

__all__ = [
    "AdaptiveTraining",
    "AdversarialTraining",
    "ClassifierTraining",
    "CudaGraphs",
    "HeadTraining",
    "JointTraining",
    "LongTailTraining",
    "PoisonedTraining",
    "WarmUpAndDrops",
    "cosine_to_zero",
]
