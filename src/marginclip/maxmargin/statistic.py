"""What the detector compares: the margin of the model's decision without bounds and with them (paper 1, Eq. 4, and ours)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from marginclip.maxmargin.margin import margin

STATISTICS = ("drop", "shortfall", "both")


def margin_drop(logits: Tensor, bounded_logits: Tensor) -> Tensor:
    """The detection statistic S (Eq. 4): the margin of the model's decision, without bounds minus with bounds.

    Args:
        logits: of the model, (N, K).
        bounded_logits: of the repaired network on the same images, (N, K).

    Returns:
        The margin drops (N,), in logits: about 0 for clean images and large for triggered ones.

    Examples:
        The second image loses 9 of its 10 logits of margin; the first loses nothing:

        >>> margin_drop(torch.tensor([[3.0, 1.0], [0.0, 10.0]]), torch.tensor([[3.0, 1.0], [0.0, 1.0]])).tolist()
        [0.0, 9.0]
    """
    return largest_of(*margins(logits, bounded_logits), [DROP])


def margins(logits: Tensor, bounded_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The margins (N,) of the model's decision without and with bounds, from the logits (N, K) of both networks."""
    decisions = logits.argmax(1)
    return margin(logits, decisions), margin(bounded_logits, decisions)


def expected_margin(without: Tensor, bounded: Tensor) -> tuple[float, float]:
    """The line that tells of a clean image's margin what bounds leave of it, by least squares.

    Args:
        without: margins of clean images without bounds, (M,) in logits.
        bounded: the same under the bounds, (M,).

    Returns:
        Slope and intercept, in logits; where all margins are equal the slope is 1.

    Examples:
        Bounds that leave half of every margin:

        >>> expected_margin(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]))
        (0.5, 0.0)
    """
    x, y = without.double(), bounded.double()
    spread = (x - x.mean()).square().sum()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if float(spread) > 0 else 1.0
    return slope, float(y.mean() - slope * x.mean())


class Line(NamedTuple):
    """One way to compare the margin under bounds with that without: ``(slope * without + intercept - bounded) / scale``."""

    slope: float
    intercept: float
    scale: float = 1.0


DROP = Line(1.0, 0.0)


def detection_lines(statistic: str, without: Tensor, bounded: Tensor) -> list[Line]:
    """The lines whose largest value is a detection statistic.

    Bounds take margin from clean images, too, and more where there is more. So a small drop says much where the margin is small. The
    *shortfall* compares with the margin that is expected of a clean image instead (:func:`expected_margin`). It misses triggers that bounds
    leave alone but for their excess, which the drop shows. ``both`` takes the larger of the two. Ours, but for ``drop``.

    Args:
        statistic: ``drop``, ``shortfall``, both in logits; or ``both``, each in standard deviations of the clean images.
        without: margins of clean images, (M,) in logits.
        bounded: the same under the bounds, (M,).

    Returns:
        One line, or two for ``both``.
    """
    if statistic == "drop":
        return [DROP]
    shortfall = Line(*expected_margin(without, bounded))
    if statistic == "shortfall":
        return [shortfall]
    return [_standardised(line, without.double(), bounded.double()) for line in (DROP, shortfall)]


def _standardised(line: Line, without: Tensor, bounded: Tensor) -> Line:
    values = largest_of(without, bounded, [line])
    deviation = float(values.std(correction=0))
    return Line(line.slope, line.intercept - float(values.mean()), deviation if deviation > 0 else 1.0)


def largest_of(without: Tensor, bounded: Tensor, lines: Sequence[Line]) -> Tensor:
    """The largest value (N,) of the ``lines`` for margins (N,) without and with bounds."""
    values = [(slope * without + intercept - bounded) / scale for slope, intercept, scale in lines]
    return torch.stack(values).amax(0)
