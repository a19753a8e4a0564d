"""Whether a GPU computes, and moving small tensors to it without waiting for what it is doing."""

from __future__ import annotations

import torch
from torch import Tensor


def gpu_wanted(accelerator: str) -> bool:
    """Whether the Trainer's ``accelerator`` means a GPU of this machine."""
    return accelerator != "cpu" and torch.cuda.is_available()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. A plain copy to a GPU makes the program wait until the GPU has done all that was asked of it before."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
