"""How close each class is to clean images of the others: by a few small steps of each image, and by one small warp of all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.errors import require
from marginclip.maxmargin import MaximumMargins, MaximumMarginTest
from marginclip.maxmargin.margin import ascend_margins, margin
from marginclip.networks.copies import frozen_copy
from marginclip.networks.logits import batched_logits
from marginclip.networks.memory import images_that_fit, memory_budget

STARTS, STEPS, STEP_SIZE, ALPHA = 20, 8, 0.01, 0.01
WARP_STEPS, CONTROL_POINTS = 10, 4
WARP_LIMIT = 1 / 32  # of an image's side: a pixel of 32


def reach(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    starts: int = STARTS,
    steps: int = STEPS,
    alpha: float = ALPHA,
    seed: int = 0,
) -> MaximumMargins:
    """How far clean images of other classes get towards each class by a few small steps, and whether one class is too close.

    ``starts`` images take ``steps`` steps of root mean square 0.01 towards each class; its statistic is their mean margin, in logits.
    A trigger is a small change that turns any image into the target class, so that class is within reach from everywhere. The
    largest statistic is judged among the others as MM-BD judges its own (:class:`~marginclip.maxmargin.MaximumMarginTest`), where all
    are positive. Where a class stays out of reach, its mean margin is negative, and they are judged by their spread.
    """
    network, values = frozen_copy(model, images[:1]), []
    for wanted, chosen in _others(network, images, labels, starts, seed):
        moved = ascend_margins(network, wanted, chosen, steps=steps, step_size=STEP_SIZE, rule="unit_rms")
        values.append(moved.margins.mean().cpu())
    found, test = torch.stack(values), MaximumMarginTest(alpha=alpha, seed=seed)
    return test.judge(found) if float(found.min()) > 0 else test.judge_signed(found)


def warp_reach(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    starts: int = STARTS,
    steps: int = WARP_STEPS,
    alpha: float = ALPHA,
    seed: int = 0,
) -> MaximumMargins:
    """How far one small smooth warp takes clean images of other classes towards each class, and whether one class is too close.

    The warp is of the family of WaNet's (Nguyen and Tran 2021): displacements of at most a thirty-second of the side at 4 x 4 control
    points, enlarged bicubically to the image. ``steps`` signed gradient steps raise the mean margin of a class over ``starts`` images
    that all share the warp. The statistic of the class is by how much the mean margin grows at most on the way, in logits. The largest
    is judged as in :func:`reach`.
    """
    network, values = frozen_copy(model, images[:1]), []
    for wanted, chosen in _others(network, images, labels, starts, seed):
        values.append(_gain_by_warping(network, wanted, chosen, steps))
    return MaximumMarginTest(alpha=alpha, seed=seed).judge(torch.tensor(values))


def warped(images: Tensor, control: Tensor) -> Tensor:
    """Images (N, C, H, W) resampled where a smooth warp says: displacements ``control`` (1, 2, P, P) to the right and down at P x P
    points, as shares of the image's side, are enlarged bicubically; beyond the edge the edge goes on.
    """
    height, width = images.shape[-2:]
    smooth = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    identity = F.affine_grid(torch.eye(2, 3, device=images.device)[None], [1, 1, height, width], align_corners=True)
    grid = (identity + 2 * smooth).expand(len(images), -1, -1, -1)  # a side is 2 long in the units of the grid
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)


def _others(network: nn.Module, images: Tensor, labels: Tensor, starts: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each class as a wanted one (N,), at most ``starts`` random images (N, C, H, W) of the others, on the network's device."""
    device = next((parameter.device for parameter in network.parameters()), images.device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    count = batched_logits(network, images[:1].to(device)).shape[1]
    for label in range(count):
        rows = order[labels[order.to(labels.device)].cpu() != label][:starts]
        require(len(rows) > 0, f"all clean images are of class {label}: an audit needs images of other classes, too")
        yield torch.full((len(rows),), label, device=device), images[rows.to(images.device)].to(device)


def _gain_by_warping(network: nn.Module, wanted: Tensor, images: Tensor, steps: int) -> float:
    """By how much one warp of all images (N, C, H, W) raises the mean margin of the wanted classes (N,), at most on the way."""
    at_once = images_that_fit(network, images[:1], network, memory_budget(images.device))
    means: list[float] = []
    with torch.inference_mode(False), torch.enable_grad():
        images, wanted = images.clone(), wanted.clone()  # ordinary tensors, whatever the caller's mode was
        control = torch.zeros(1, 2, CONTROL_POINTS, CONTROL_POINTS, device=images.device)
        for step in range(steps + 1):
            control = control.detach().requires_grad_(step < steps)
            total, slope = 0.0, torch.zeros_like(control)
            for part, classes in zip(images.split(at_once), wanted.split(at_once), strict=True):
                values = margin(network(warped(part, control).to(images.dtype)).float(), classes)
                total += float(values.detach().sum())
                if step < steps:
                    slope += torch.autograd.grad(values.sum(), control)[0]
            means.append(total / len(images))
            # Steps that could cross the room for displacements two and a half times, as is usual for signed steps.
            control = (control.detach() + 2.5 * WARP_LIMIT / steps * slope.sign()).clamp(-WARP_LIMIT, WARP_LIMIT)
    return max(means) - means[0]
