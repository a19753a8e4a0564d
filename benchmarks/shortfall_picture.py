"""Draw the margin of every evaluation image without and with bounds, and where the two statistics of the detector cut.

    python defend.py attack=wanet training.epochs=50
    python benchmarks/shortfall_picture.py runs --attack wanet --seed 0 --output docs/figures/method_shortfall.png

Needs a finished ``mmdf`` run and its victim below the folder. Each cut is where the statistic flags half a percent of the clean images that
are shown: the detector's own threshold comes from the clean set, and is near.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rescore import decided_batches

from marginclip.maxmargin import expected_margin, margin
from marginclip.reporting import load_records
from marginclip.reporting.figures import save_png
from marginclip.reporting.style import CLEAN, TRIGGERED, new_figure, tidy

ALARMS = 0.005


def margins(batches: list) -> dict[str, np.ndarray]:
    """(2, N) margins of the model's decision without and with bounds, of clean images and of those that the attack fools."""
    found: dict[str, list[torch.Tensor]] = {"clean": [], "triggered": []}
    for batch, logits, bounded in batches:
        decisions = logits.argmax(1)
        both = torch.stack([margin(logits, decisions), margin(bounded, decisions)])
        if "labels" in batch:
            found["clean"].append(both)
        elif "targets" in batch:
            found["triggered"].append(both[:, decisions == batch["targets"]])
    return {kind: torch.cat(parts, 1).numpy() for kind, parts in found.items()}


def draw(points: dict[str, np.ndarray], title: str) -> Figure:
    """Clean and triggered images, the expected line, and the cut of each statistic."""
    clean, triggered = points["clean"], points["triggered"]
    slope, intercept = expected_margin(*torch.from_numpy(clean))
    figure = new_figure(6.4, 4.6, title)
    axes = figure.add_subplot()
    axes.plot(*clean, ".", color=CLEAN, markersize=4, alpha=0.6, label="clean")
    axes.plot(*triggered, ".", color=TRIGGERED, markersize=4, alpha=0.6, label="triggered")
    ends = np.array([0, max(clean[0].max(), triggered[0].max())])
    axes.plot(ends, slope * ends + intercept, color="black", label="expected of clean images")
    for name, style, (a, b) in (("drop", ":", (1.0, 0.0)), ("shortfall", "--", (slope, intercept))):
        cut = float(np.quantile(a * clean[0] + b - clean[1], 1 - ALARMS))
        caught = 100 * float(np.mean(a * triggered[0] + b - triggered[1] > cut))
        axes.plot(
            ends, a * ends + b - cut, style, color="black", label=f"flagged below, by {name}: {caught:.0f} % of triggered"
        )
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    tidy(axes, title="", xlabel="margin without bounds, logits", ylabel="margin with bounds, logits")
    return figure


def main() -> None:
    """Draw one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("--attack", default="wanet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/figures/method_shortfall.png"))
    options = parser.parse_args()
    for record in load_records(options.runs_dir):
        wanted = (record.choice("attack"), record.choice("defense"), record.seed) == (options.attack, "mmdf", options.seed)
        if wanted and record.status == "done":
            title = f"{record.choice('attack')}, seed {record.seed}"
            save_png(draw(margins(list(decided_batches(record, options.runs_dir))), title), options.output)
            return
    raise SystemExit(f"no finished mmdf run of attack={options.attack} seed={options.seed} below '{options.runs_dir}'")


if __name__ == "__main__":
    main()
