"""A straightforward implementation of the published script's schedule, written from its description, to be measured against.

Class by class, unfused, fp32, weight gradients left on: margins of the original network ascended by 300 plain gradient steps
with a clamp in the forward pass, three times in 300 passes over the clean set; Adam 0.1 on bounds that start at 1; lambda from
0.002 times the *sum* of margins, moved every 10 passes after 30.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.maxmargin import margin


def ascend_class(model: nn.Module, label: int, count: int, shape: tuple[int, ...], steps: int) -> Tensor:
    """``count`` images of class ``label`` with a raised margin, (count, C, H, W)."""
    images = torch.rand(count, *shape, requires_grad=True)
    classes = torch.full((count,), label)
    for _ in range(steps):
        optimizer = torch.optim.SGD([images], lr=0.01, momentum=0.2)
        optimizer.zero_grad()
        (-margin(model(images.clamp(0, 1)), classes).sum()).backward()
        optimizer.step()
    return images.detach().clamp(0, 1)


def published_mmac(
    model: nn.Module, images: Tensor, labels: Tensor, *, passes: int = 300, ascent_steps: int = 300, per_class: int = 50
) -> BoundedNetwork:
    """Bounds by the published schedule from clean images (N, C, H, W) and labels (N,)."""
    model.eval().requires_grad_(True)
    with torch.no_grad():
        targets = model(images)
    correct = targets.argmax(1) == labels
    images, labels, targets = images[correct], labels[correct], targets[correct]
    num_classes = targets.shape[1]
    bounded = BoundedNetwork(model, images[:1])
    bounded.network.requires_grad_(True)
    bounded.set_constant(1.0)
    optimizer = torch.optim.Adam(bounded.bound_parameters(), lr=0.1)
    penalty, wanted = 0.002, torch.arange(num_classes).repeat_interleave(per_class)
    for number in range(passes):
        if number % 100 == 0:
            inputs = torch.cat(
                [ascend_class(model, c, per_class, tuple(images.shape[1:]), ascent_steps) for c in range(num_classes)]
            )
        hits = 0
        order, margin_order = torch.randperm(len(images)), torch.randperm(len(inputs))
        for rows, margin_rows in zip(order.split(200), margin_order.split(200), strict=False):
            logits = bounded(images[rows])
            hits += int((logits.argmax(1) == labels[rows]).sum())
            margins = margin(bounded(inputs[margin_rows]), wanted[margin_rows])
            loss = nn.functional.mse_loss(logits, targets[rows]) + penalty * margins.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if number > 30 and number % 10 == 0:
            penalty = penalty * 1.2 if hits / len(images) >= 0.95 else penalty / 1.2
    return bounded
