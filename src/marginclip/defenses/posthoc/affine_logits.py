"""A network whose logits are scaled and shifted class by class, and the scales and shifts that fit a clean set best."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.errors import require
from marginclip.networks.copies import own_copy

SCALES = ("none", "shared", "per_class")
MAX_ITERATIONS = 2000
MAX_STARTS = 10
CONVERGED = 1e-6


class AffineLogits(nn.Module):
    """Maps images to ``scale * network(images) + shift``, with a copy of ``network`` in evaluation mode.

    ``scale`` is (1,) or (K,), ``shift`` (K,), in logits; neither is a parameter.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, *, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.network = own_copy(network)
        device = next(iter(network.parameters()), shift).device
        self.register_buffer("scale", scale.detach().float().to(device).clone())
        self.register_buffer("shift", shift.detach().float().to(device).clone())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits * self.scale + self.shift


def fit_affine(
    logits: Tensor, labels: Tensor, *, scale: str, shift: bool, l2: float, advice: str = "raise l2"
) -> tuple[Tensor, Tensor]:
    """The scale, (1,) or (K,), and shift (K,), both float64, that minimise the mean cross entropy of ``scale * logits + shift``.

    ``logits`` (N, K), ``labels`` (N,). ``scale`` is ``none`` (stays 1), ``shared`` or ``per_class``; without ``shift`` the shift
    stays 0. ``l2 / 2`` times the squared distance from scale 1 and shift 0 is added. The problem is convex, as the scale multiplies
    the logits (a temperature would divide them), and is solved from the identity by L-BFGS in float64 until no component
    of the gradient exceeds 1e-6. Nothing is random. With ``l2`` 0 there is no minimum where a class has no images or larger
    scales fit ever better. Raises :class:`UserError` where it does not converge, with ``advice``, and
    for a shift where a class has no image: it would be switched off.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    num_classes = logits.shape[1]
    absent = (labels.bincount(minlength=num_classes) == 0).nonzero().flatten().tolist()
    require(not shift or not absent, f"class {absent[0] if absent else ''} has no clean image: its offset cannot be learned")
    identity = torch.cat([logits.new_ones(_num_scales(scale, num_classes)), logits.new_zeros(num_classes if shift else 0)])
    learned = identity.clone().requires_grad_(True)

    def objective() -> Tensor:
        scales, shifts = _split(learned, scale, num_classes)
        return F.cross_entropy(logits * scales + shifts, labels) + l2 / 2 * (learned - identity).square().sum()

    gradient = _minimise(learned, objective)
    require(
        gradient <= CONVERGED * max(1.0, l2),
        f"the scales and shifts of the logits did not converge on the clean set (gradient {gradient:.2g}); {advice}",
    )
    found_scale, found_shift = _split(learned.detach(), scale, num_classes)
    return found_scale, found_shift


def _num_scales(scale: str, num_classes: int) -> int:
    return {"none": 0, "shared": 1, "per_class": num_classes}[scale]


def _split(learned: Tensor, scale: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """Scale and shift from what is learned, with the identity's in the place of those that are not."""
    count = _num_scales(scale, num_classes)
    scales, shifts = learned[:count], learned[count:]
    return (scales if count else learned.new_ones(1)), (shifts if len(shifts) else learned.new_zeros(num_classes))


def _minimise(learned: Tensor, objective: Callable[[], Tensor]) -> float:
    """Move ``learned`` to the minimum of ``objective()``; returns the largest component of the gradient there.

    Where L-BFGS comes to rest too early, which its line search may do in a narrow valley, it begins anew from there.
    """
    largest = float("inf")
    for _ in range(MAX_STARTS):
        largest = _descend(learned, objective)
        if largest <= CONVERGED:
            break
    return largest


def _descend(learned: Tensor, objective: Callable[[], Tensor]) -> float:
    optimizer = torch.optim.LBFGS(
        [learned],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=CONVERGED / 100,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
        closure()
    assert learned.grad is not None
    return float(learned.grad.abs().max())
