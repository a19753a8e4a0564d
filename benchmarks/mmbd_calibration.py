"""How often MM-BD accuses clean models, by simulation: the published p-value and the calibrated one (docs/detection.md).

    python benchmarks/mmbd_calibration.py

Draws sets of K statistics without any backdoor, gamma distributed and otherwise, and prints the share (%) with p <= 0.05.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from marginclip.maxmargin.mmbd import MaximumMarginTest, largest_p_value

ALPHA = 0.05


def gamma(shape: float, count: int, num_classes: int) -> Tensor:
    """Sets of gamma statistics (count, num_classes)."""
    torch.manual_seed(int(shape * 1000 + num_classes))
    return torch.distributions.Gamma(float(shape), 1.0).sample((count, num_classes)).double()


def calibrated(sets: Tensor, simulations: int) -> float:
    """The share of the sets that the default test accuses, in %."""
    test = MaximumMarginTest(simulations=simulations, alpha=ALPHA)
    return 100 * sum(test.judge(values).detected for values in sets) / len(sets)


def published(sets: Tensor) -> float:
    """The same by the published p-value."""
    return 100 * float((largest_p_value(sets, sets.shape[1])[0] <= ALPHA).double().mean())


def main() -> None:
    """Print a line for every distribution and number of classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sets", type=int, default=2000, help="sets for the calibrated p-value; ten times as many for the published one"
    )
    parser.add_argument(
        "--simulations", type=int, default=1000, help="draws of the calibration for every set (a run takes 10,000)"
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[4, 10, 43, 100])
    options = parser.parse_args()
    print(f"{'statistics':<20} {'K':>4} {'published':>10} {'calibrated':>11}")
    for num_classes in options.classes:
        for shape in (2, 8, 40):
            plain = published(gamma(shape, 10 * options.sets, num_classes))
            ours = calibrated(gamma(shape, options.sets, num_classes), options.simulations)
            print(f"{f'gamma, shape {shape}':<20} {num_classes:>4} {plain:>10.1f} {ours:>11.1f}", flush=True)
        torch.manual_seed(num_classes)
        normal = (10 + torch.randn(options.sets, num_classes)).double()
        skewed = torch.exp(0.5 * torch.randn(options.sets, num_classes)).double()
        for name, sets in (("normal, 10 +- 1", normal), ("log-normal, 0.5", skewed)):
            print(
                f"{name:<20} {num_classes:>4} {published(sets):>10.1f} {calibrated(sets, options.simulations):>11.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
