"""Surgery on a network: finding its activations and putting bounds behind them."""

from marginclip.clipping.bounded_network import BoundedNetwork, activation_extremes
from marginclip.clipping.bounds import Bound

__all__ = ["Bound", "BoundedNetwork", "activation_extremes"]
