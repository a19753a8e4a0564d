"""Activation functions by name, so that a model's activation is one option."""

from __future__ import annotations

from torch import nn

from marginclip.errors import UserError, nearest

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def make_activation(name: str, *, negative_slope: float = 0.1) -> nn.Module:
    """A new activation module.

    ``negative_slope`` applies to ``leaky_relu`` alone (paper 1, section 5.3 uses 0.1).
    Raises :class:`UserError` for an unknown name.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"model.activation must be one of {', '.join(ACTIVATIONS)}, got '{name}'{nearest(name, ACTIVATIONS)}")
    return nn.LeakyReLU(negative_slope) if name == "leaky_relu" else ACTIVATIONS[name]()
