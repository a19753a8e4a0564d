"""How the cost of a repair grows with classes, image side, clean images and width, that of a sweep with its cells; what a process costs to
start.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--rows classes side] [--cells 1 4 16] [--figure docs/figures/scaling.png]
    python benchmarks/scaling.py --points benchmarks/results/scaling.json --figure docs/figures/scaling.png

The second draws what earlier runs, on several machines, have measured.

Each point is a process of its own: a small ResNet of random weights (they change no time) and random images are repaired with
``--steps`` bound steps, then once more for the detector: half of the images are left out, and a step takes half as many. One setting
moves from the base (10 classes, 32 px, 50 images a class, width 16), the others stay. Seconds are of the processor, memory is the peak of
the process less what it had before the repair. A sweep's cells are tiny ones of one victim (digits, bounds set and nothing learned): what
is seen is what the framework itself costs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

BASE = {"classes": 10, "side": 32, "per_class": 50, "width": 16}
ROWS = {
    "classes": (10, 100, 1000),
    "side": (32, 64, 128, 224),
    "per_class": (5, 50, 500),
    "width": (8, 16, 32),
}
NAMES = {
    "classes": "classes",
    "side": "image side, px",
    "per_class": "clean images a class",
    "width": "width",
    "cells": "cells of a sweep",
}
TICKS = (2, 5, 10, 20, 50, 100, 200)  # processor seconds
DEFEND = [sys.executable, "-m", "marginclip", "defend"]
CELL = "dataset=digits trainer=exact training.epochs=2 model.width=4 clean_per_class=4 figures=false logger=none attack.min_success=0"
CELL += " defense=static_clip defense.detector.folds=0 trainer.enable_progress_bar=false"


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def point(settings: dict[str, int], steps: int) -> dict[str, float]:
    """Seconds and memory of one repair, and of one that leaves half of the images out."""
    from marginclip.allocator import keep_freed_memory
    from marginclip.defenses import MMAC
    from marginclip.models import ResNet
    from marginclip.silence import silence_lightning, silent_trainer

    silence_lightning()
    keep_freed_memory()
    torch.manual_seed(0)
    classes, per_class = settings["classes"], settings["per_class"]
    per_class = min(per_class, max(2, 5000 // classes))
    model = ResNet(classes, blocks=(1, 1, 1), width=settings["width"]).eval().to(memory_format=torch.channels_last)
    images = torch.rand(classes * per_class, 3, settings["side"], settings["side"])
    with torch.no_grad():
        model.train()(images[:200])
        model.eval()
        labels = torch.cat([model(part).argmax(1) for part in images.split(200)])  # all correct: none is left out
    before, seconds = peak(), []
    for share, rows in ((1.0, slice(None)), (0.5, slice(None, None, 2))):
        defense, start = MMAC(steps=steps, extra_steps=0), time.process_time()
        with defense.in_proportion(share):
            defense.fit(model, images[rows], labels[rows], make_trainer=silent_trainer)
        seconds.append(time.process_time() - start)
    return {"images": len(images), "repair": seconds[0], "fold": seconds[1], "mib": peak() - before}


def start_up() -> list[tuple[str, float]]:
    """Processor seconds of a fresh process up to where a cell begins."""
    parts = {
        "python": "pass",
        "torch": "import torch",
        "torch, lightning and hydra": "import torch, lightning, hydra",
        "marginclip, to the composed settings": "from marginclip.cli import main; main(['defend', 'attack=badnet', '--cfg', 'job'])",
    }
    return [(name, child_seconds([sys.executable, "-c", code])) for name, code in parts.items()]


def child_seconds(command: list[str]) -> float:
    """Processor seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def sweep(cells: int) -> tuple[float, float]:
    """Processor seconds of a sweep of so many cells whose victim is there, and of the same sweep once more, when all is done."""
    with tempfile.TemporaryDirectory() as folder:
        common = [*CELL.split(), f"runs_dir={folder}"]
        child_seconds([*DEFEND, *common, "defense.start.share=0.99"])  # trains the victim
        shares = ",".join(f"{0.2 + 0.7 * number / cells:.3f}" for number in range(cells))
        command = [*DEFEND, "-m", *common, f"defense.start.share={shares}"]
        return child_seconds(command), child_seconds(command)


def draw(points: dict[str, list[tuple[int, float]]], output: Path) -> None:
    """A panel a setting: seconds of the repair, or of the sweep."""
    from marginclip.reporting.figures import save_png
    from marginclip.reporting.style import AFTER, new_figure

    figure = new_figure(3.2 * len(points), 3.2, "Seconds of a repair, or of a sweep, as one setting moves")
    for number, (row, found) in enumerate(points.items()):
        axes = figure.add_subplot(1, len(points), number + 1)
        axes.loglog([value for value, _ in found], [seconds for _, seconds in found], marker="o", color=AFTER)
        axes.set_xlabel(NAMES[row])
        axes.set_xticks([value for value, _ in found], [str(value) for value, _ in found], fontsize=8)
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS], fontsize=8)
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
        axes.set_ylabel("processor s" if number == 0 else "")
    save_png(figure, output)


def main() -> None:
    """Print a table for each setting, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--cells", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--points", type=Path, help="draw these seconds, by setting and value, and measure nothing")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(point(json.loads(given.point), given.steps)))
        return
    if given.points:
        if not given.figure:
            parser.error("--points needs --figure, the file to draw into")
        draw(json.loads(given.points.read_text()), given.figure)
        return
    points: dict[str, list[tuple[int, float]]] = {}
    for row in given.rows:
        print(f"\n| {NAMES[row]} | clean images | repair, s | with half of the images, s | MiB |\n|---|---|---|---|---|")
        for value in ROWS[row]:
            settings = json.dumps(BASE | {row: value})
            command = [sys.executable, __file__, "--point", settings, "--steps", str(given.steps)]
            costs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            points.setdefault(row, []).append((value, costs["repair"]))
            print(
                f"| {value} | {costs['images']} | {costs['repair']:.1f} | {costs['fold']:.1f} | {costs['mib']:.0f} |",
                flush=True,
            )
    if given.cells:
        print("\n| cells of a sweep | processor s | a cell, s | once more, when all is done, s |\n|---|---|---|---|")
    for cells in given.cells:
        first, again = sweep(cells)
        points.setdefault("cells", []).append((cells, first))
        print(f"| {cells} | {first:.1f} | {first / cells:.1f} | {again:.1f} |", flush=True)
    print("\n| start of a process | processor s |\n|---|---|")
    for name, seconds in start_up():
        print(f"| {name} | {seconds:.1f} |", flush=True)
    if given.figure and points:
        draw(points, given.figure)


if __name__ == "__main__":
    main()
