"""Post-training defenses behind one contract: model and clean set in, repaired module out."""

from marginclip.defenses.auto import Auto
from marginclip.defenses.base import Defense
from marginclip.defenses.bound_learning import BoundLearning
from marginclip.defenses.fine_pruning import FinePruning
from marginclip.defenses.finetune import FineTune
from marginclip.defenses.fit import cross_fitted_logits, fit_defense, repair
from marginclip.defenses.ibau import IBAU
from marginclip.defenses.inversion import InversionPlan
from marginclip.defenses.last_layer import LastLayer
from marginclip.defenses.logit_adjustment import LogitAdjustment
from marginclip.defenses.logit_calibration import LogitCalibration
from marginclip.defenses.nad import NAD
from marginclip.defenses.neural_cleanse import NeuralCleanse
from marginclip.defenses.settings import AscentPlan, BoundStart
from marginclip.defenses.static_clip import StaticClip
from marginclip.defenses.tau_normalisation import TauNormalisation
from marginclip.defenses.tau_search import TauSearch

__all__ = [
    "AscentPlan",
    "Auto",
    "BoundLearning",
    "BoundStart",
    "Defense",
    "FinePruning",
    "FineTune",
    "IBAU",
    "InversionPlan",
    "LastLayer",
    "LogitAdjustment",
    "LogitCalibration",
    "NAD",
    "NeuralCleanse",
    "StaticClip",
    "TauNormalisation",
    "TauSearch",
    "cross_fitted_logits",
    "fit_defense",
    "repair",
]
