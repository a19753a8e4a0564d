"""marginclip repairs a trained image classifier without its training set, by bounding its activations.

A model, clean images (N, C, H, W) in [0, 1] with labels (N,), here generated ones, and new images to decide about:

>>> import marginclip, torch
>>> _ = torch.manual_seed(0)
>>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
>>> images, new_images = torch.rand(120, 3, 4, 4), torch.rand(5, 3, 4, 4)
>>> labels = model(images).argmax(1)
>>> repaired = marginclip.repair(model, images[::2], labels[::2])
>>> detector = marginclip.MarginDropDetector.fit(model, repaired, images[1::2])
>>> detector(new_images).decisions.shape
torch.Size([5])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marginclip.api import repair
    from marginclip.clipping import BoundedNetwork
    from marginclip.defenses import MMAC, MMBM, MMOM, Auto, BoundLearning
    from marginclip.errors import UserError
    from marginclip.maxmargin import Detection, MarginDropDetector, MaximumMargins, maximum_margin_detection
    from marginclip.service import Artefact, Audit, audit, export, scan

_HOMES = {
    "repair": "marginclip.api",
    "MMAC": "marginclip.defenses",
    "MMOM": "marginclip.defenses",
    "MMBM": "marginclip.defenses",
    "Auto": "marginclip.defenses",
    "BoundLearning": "marginclip.defenses",
    "BoundedNetwork": "marginclip.clipping",
    "MarginDropDetector": "marginclip.maxmargin",
    "Detection": "marginclip.maxmargin",
    "MaximumMargins": "marginclip.maxmargin",
    "maximum_margin_detection": "marginclip.maxmargin",
    "UserError": "marginclip.errors",
    "Artefact": "marginclip.service",
    "Audit": "marginclip.service",
    "audit": "marginclip.service",
    "export": "marginclip.service",
    "scan": "marginclip.service",
}

__version__ = "0.1.0"
__all__ = [
    "MMAC",
    "MMBM",
    "MMOM",
    "Artefact",
    "Audit",
    "Auto",
    "BoundLearning",
    "BoundedNetwork",
    "Detection",
    "MarginDropDetector",
    "MaximumMargins",
    "UserError",
    "audit",
    "export",
    "maximum_margin_detection",
    "repair",
    "scan",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that a command line's help and mistakes answer at once."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'marginclip' has no attribute '{name}'")
