"""Post-training defenses behind one contract: model and clean set in, repaired network out."""

from marginclip.defenses.base import ComputedDefense, Defense, LearningDefense, RepairResult, Variant
from marginclip.defenses.choosing.auto import Auto
from marginclip.defenses.clipping.bound_learning import BoundLearning
from marginclip.defenses.clipping.mmac import MMAC
from marginclip.defenses.clipping.mmbm import MMBM
from marginclip.defenses.clipping.mmom import MMOM
from marginclip.defenses.clipping.settings import AscentPlan, BoundStart
from marginclip.defenses.clipping.static_clip import StaticClip
from marginclip.defenses.cross_fitting import cross_fitted_logits
from marginclip.defenses.posthoc.logit_adjustment import LogitAdjustment
from marginclip.defenses.posthoc.logit_calibration import LogitCalibration
from marginclip.defenses.posthoc.tau_normalisation import TauNormalisation
from marginclip.defenses.posthoc.tau_search import TauSearch
from marginclip.defenses.weights.anp import ANP
from marginclip.defenses.weights.fine_pruning import FinePruning
from marginclip.defenses.weights.finetune import FineTune
from marginclip.defenses.weights.ft_sam import FTSAM
from marginclip.defenses.weights.ibau import IBAU
from marginclip.defenses.weights.inversion import InversionPlan
from marginclip.defenses.weights.last_layer import LastLayer
from marginclip.defenses.weights.mmac_finetune import MMACFineTune
from marginclip.defenses.weights.nad import NAD
from marginclip.defenses.weights.neural_cleanse import NeuralCleanse

__all__ = [
    "ANP",
    "AscentPlan",
    "Auto",
    "BoundLearning",
    "BoundStart",
    "ComputedDefense",
    "Defense",
    "FTSAM",
    "FinePruning",
    "FineTune",
    "IBAU",
    "InversionPlan",
    "LastLayer",
    "LearningDefense",
    "LogitAdjustment",
    "LogitCalibration",
    "MMAC",
    "MMACFineTune",
    "MMBM",
    "MMOM",
    "NAD",
    "NeuralCleanse",
    "RepairResult",
    "StaticClip",
    "TauNormalisation",
    "TauSearch",
    "Variant",
    "cross_fitted_logits",
]
