"""The idea: margins, the search for their maxima, the objectives, lambda, and the detector. Torch only."""

from marginclip.maxmargin.detector import Detection, MarginDropDetector
from marginclip.maxmargin.lambda_control import LambdaController
from marginclip.maxmargin.margin import MarginAscent, ascend_margins, margin, random_starts
from marginclip.maxmargin.mmbd import MaximumMargins, MaximumMarginTest, maximum_margin_detection
from marginclip.maxmargin.null import p_values
from marginclip.maxmargin.objectives import (
    BoundObjective,
    Measured,
    MMACObjective,
    MMBMObjective,
    MMOMObjective,
    Objective,
    mmac,
    mmbm,
    mmom,
)
from marginclip.maxmargin.statistic import detection_lines, expected_margin, margin_drop

__all__ = [
    "BoundObjective",
    "Detection",
    "MMACObjective",
    "MMBMObjective",
    "MMOMObjective",
    "Measured",
    "MarginAscent",
    "MarginDropDetector",
    "MaximumMarginTest",
    "MaximumMargins",
    "Objective",
    "LambdaController",
    "ascend_margins",
    "detection_lines",
    "expected_margin",
    "margin",
    "margin_drop",
    "maximum_margin_detection",
    "mmac",
    "mmbm",
    "mmom",
    "p_values",
    "random_starts",
]
