"""What training minimises in the place of the plain cross entropy."""

from marginclip.losses.base import Loss, Network, SecondStage
from marginclip.losses.cosine import CosineLinear, final_layer, with_cosine_head
from marginclip.losses.gcl import GCL, gcl_logits, tail_ranks
from marginclip.losses.ldam import LDAM
from marginclip.losses.mixup import Mixup, mixup

__all__ = [
    "GCL",
    "LDAM",
    "CosineLinear",
    "Loss",
    "Mixup",
    "Network",
    "SecondStage",
    "final_layer",
    "gcl_logits",
    "mixup",
    "tail_ranks",
    "with_cosine_head",
]
