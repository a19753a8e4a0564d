"""From a model that somebody handed you to a decision: audit it, repair it, scan images, export the repair."""

from marginclip.service.artefact import Artefact, model_digest, read_artefact
from marginclip.service.audit import Audit, audit
from marginclip.service.export import DecisionNetwork, export
from marginclip.service.scan import ScannedImage, scan

__all__ = [
    "Artefact",
    "Audit",
    "DecisionNetwork",
    "ScannedImage",
    "audit",
    "export",
    "model_digest",
    "read_artefact",
    "scan",
]
