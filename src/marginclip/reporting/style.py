"""What all figures share: colours that colour-blind readers can tell apart (Okabe and Ito), sizes, and the empty figure."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

Arrays = dict[str, np.ndarray]

CLEAN, TRIGGERED, BOUND, NEUTRAL = "#0072B2", "#D55E00", "#000000", "#666666"
# A model as it was given, and its repair: light and dark also without colour.
BEFORE, AFTER = "#E69F00", "#0072B2"
DPI = 100


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, sizes in inches; it belongs to no pyplot state."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def tidy(axes: Axes, *, title: str, xlabel: str, ylabel: str) -> None:
    """Title, labels with units, a light grid, and no frame at the top and right."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
