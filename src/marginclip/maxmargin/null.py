"""Null distributions of the detection statistic, fitted to clean samples: S -> p-value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from marginclip.errors import require

NULLS = ("gaussian", "empirical", "tail")
TAIL_SHARE, FEWEST_EXCESSES = 0.1, 3


def p_values(statistic: Tensor, clean: Tensor, *, null_distribution: str = "tail") -> Tensor:
    """P(S >= statistic) for a clean sample, given the statistics of clean samples.

    Where the clean statistics do not vary there is nothing to judge by, and every p-value is 1.

    Args:
        statistic: the values to judge, (N,).
        clean: the statistics of clean samples, (M,).
        null_distribution: ``gaussian``: mean and unbiased standard deviation of the clean samples (the papers). ``empirical``:
            (1 + how many clean samples reach it) / (M + 1), which never errs on the optimistic side but cannot fall below
            1 / (M + 1). ``tail``: the empirical one up to the largest tenth of the clean samples, and a generalised Pareto
            tail behind it, fitted by probability-weighted moments (Hosking and Wallis 1987) with a shape in [0, 0.5]: no
            lighter than exponential.

    Returns:
        The p-values (N,), float32 in [0, 1]; far out, where they are too small for a float32, they are 0.

    Raises:
        UserError: for another null distribution.

    Examples:
        Of 4 clean samples 1 reaches 2.5, and none 9; the Gaussian null takes 9 for impossible:

        >>> clean = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> p_values(torch.tensor([2.5, 9.0]), clean, null_distribution="empirical").tolist()
        [0.4000000059604645, 0.20000000298023224]
        >>> p_values(torch.tensor([9.0]), clean, null_distribution="gaussian").item() < 1e-8
        True
    """
    require(
        null_distribution in NULLS,
        f"detector.null_distribution must be one of {', '.join(NULLS)}, got '{null_distribution}'",
    )
    clean = clean.double().to(statistic.device)
    statistic = statistic.double()
    if len(clean) < 2 or float(clean.max() - clean.min()) <= 1e-9 * max(1.0, float(clean.abs().max())):
        return torch.ones_like(statistic).float()
    if null_distribution == "gaussian":
        standardised = (statistic - clean.mean()) / (clean.std() * math.sqrt(2))
        upper_tail: Tensor = 0.5 * torch.special.erfc(standardised)
        return upper_tail.float()
    ordered = clean.sort().values
    reached = len(clean) - torch.searchsorted(ordered, statistic, right=False)
    empirical: Tensor = (1 + reached) / (len(clean) + 1)
    return (empirical if null_distribution == "empirical" else _with_tail(statistic, ordered, empirical)).float()


def threshold(clean: Tensor, theta: float, *, null_distribution: str = "tail") -> float:
    """The statistic at which the p-value falls below ``theta``, by bisection; infinity when it never does."""
    low, high = float(clean.min()), float(clean.max()) + 1.0
    for _ in range(60):
        if float(p_values(torch.tensor([high]), clean, null_distribution=null_distribution)) < theta:
            break
        high += 2 * (high - low)
    else:
        return float("inf")
    for _ in range(60):
        middle = (low + high) / 2
        if float(p_values(torch.tensor([middle], dtype=torch.float64), clean, null_distribution=null_distribution)) < theta:
            high = middle
        else:
            low = middle
    return high


def _with_tail(statistic: Tensor, ordered: Tensor, empirical: Tensor) -> Tensor:
    count = max(FEWEST_EXCESSES, round(TAIL_SHARE * len(ordered)))
    if count >= len(ordered):
        return empirical
    start = ordered[-count - 1]
    above = ordered[ordered > start]  # fewer where many are alike, as with bounds that take nothing from most images
    if len(above) < FEWEST_EXCESSES:
        return empirical
    shape, scale = pareto_by_moments(above - start)
    excess = (statistic - start).clamp_min(0)
    survival = torch.exp(-excess / scale) if shape == 0 else (1 + shape * excess / scale) ** (-1 / shape)
    base = (1 + len(above)) / (len(ordered) + 1)
    return torch.where(statistic > start, base * survival, empirical)


def pareto_by_moments(excesses: Tensor) -> tuple[float, float]:
    """Shape in [0, 0.5] and scale of a generalised Pareto distribution from its positive ``excesses`` (n,) in ascending order."""
    count = len(excesses)
    mean = float(excesses.mean())
    weights = (count - torch.arange(1, count + 1, dtype=excesses.dtype, device=excesses.device)) / (count - 1)
    weighted = float((weights * excesses).mean())
    denominator = mean - 2 * weighted
    if denominator <= 0:
        return 0.5, mean * 0.5
    shape = min(max(2 - mean / denominator, 0.0), 0.5)
    return shape, mean * (1 - shape)
