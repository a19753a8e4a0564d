"""Repair and detection through the public functions alone, against triggers that are in neither paper.

    python benchmarks/new_triggers.py --runs-dir runs

Half of 100 clean images a class learn the bounds, the other half tell the detector what is usual, as docs/your-model.md shows.
Victims that are not in the store are trained first.
"""

from __future__ import annotations

import argparse

import torch
from clean_sets import Judge
from verdicts import obtained

import marginclip
from marginclip.silence import silence_lightning

VICTIMS = ("attack=one_pixel", "attack=sinusoid", "attack=blend_full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", default="runs")
    given = parser.parse_args()
    silence_lightning()
    print("| trigger | no defense | MMAC | MMDF | MMDF, repair decides | false alarms |\n|---|---|---|---|---|---|")
    for options in VICTIMS:
        setup, _ = obtained(options, given.runs_dir, clean_per_class=100)
        images, labels = setup.data.clean_set()
        half = torch.arange(len(images)) % 2 == 0
        repaired = marginclip.repair(setup.model, images[half], labels[half], precision="32-true", tolerance=None)
        detector = marginclip.MarginDropDetector.fit(setup.model, repaired, images[~half])
        print(f"| {options.partition('=')[2]} | {' | '.join(Judge(setup).rows(detector))} |", flush=True)


if __name__ == "__main__":
    main()
