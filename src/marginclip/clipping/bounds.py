"""What a bounded network is made of beside the network: bounds behind activations, and offsets behind the logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from marginclip.clipping.activations import Site

SMALLEST_SCALE = 1e-3


class Bound(nn.Module):
    """Clips one activation call: ``min(x, upper)``, and ``max(., lower)`` where there is a lower bound, a value a channel.

    ``upper`` and ``lower`` are parameters (num_channels,); infinite ones leave the input as it is, bit for bit. The gradient
    reaches a bound only from the values that it cuts, and an input only from those that it does not.
    """

    upper: nn.Parameter
    lower: nn.Parameter | None

    def __init__(self, site: Site) -> None:
        super().__init__()
        shape = [1] * site.num_axes
        shape[site.axis] = site.num_channels
        self.view, self.axis = tuple(shape), site.axis
        self.upper = nn.Parameter(torch.full((site.num_channels,), float("inf")))
        self.lower = nn.Parameter(torch.full((site.num_channels,), float("-inf"))) if site.two_sided else None
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        upper = self.upper.to(x.dtype).view(self.view)
        x = torch.where(x > upper, upper, x)
        if self.lower is not None:
            lower = self.lower.to(x.dtype).view(self.view)
            x = torch.where(x < lower, lower, x)
        return x

    def values(self) -> Iterator[nn.Parameter]:
        """The upper and, if there is one, the lower bound."""
        yield self.upper
        if self.lower is not None:
            yield self.lower

    @torch.no_grad()
    def project_(self) -> None:
        """Bring the bounds back to where they make sense: not below zero for a non-negative activation, lower <= upper."""
        if self.lower is None:
            self.upper.clamp_(min=0)
        else:
            torch.minimum(self.lower, self.upper, out=self.lower)


class LogitOffsets(nn.Module):
    """Adds a learnable number a class, ``value`` (K,), to logits (N, K); if ``scaled``, multiplies all by one, ``scale`` (1,), before.

    At value 0 and scale 1, as at first, no logit changes. What is given back is in full precision.
    """

    def __init__(self, num_classes: int, *, scaled: bool = False) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(num_classes))
        self.scale = nn.Parameter(torch.ones(1)) if scaled else None
        self.enabled = True

    def forward(self, logits: Tensor) -> Tensor:
        if not self.enabled:
            return logits
        logits = logits.float()  # in full precision: ties would go to the first class
        return (logits if self.scale is None else logits * self.scale) + self.value

    def state(self) -> dict[str, Tensor]:
        """``offsets`` (K,) and, where there is one, ``scale`` (1,): detached copies."""
        values = {"offsets": self.value} | ({} if self.scale is None else {"scale": self.scale})
        return {name: value.detach().clone() for name, value in values.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Set them from :meth:`state`; one without a scale, of before there was one, has the scale 1."""
        self.value.copy_(state["offsets"])
        if self.scale is not None:
            self.scale.copy_(state.get("scale", torch.ones(1)))

    @torch.no_grad()
    def project_(self) -> None:
        """Keep the scale positive: a negative one would turn the order of the classes round."""
        if self.scale is not None:
            self.scale.clamp_(min=SMALLEST_SCALE)
