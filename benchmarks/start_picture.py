"""Draw the picture of docs/start.md: what a poisoned model decides, and what the detector makes of it.

    python benchmarks/start_picture.py RUN_FOLDER [--output docs/figures/start.png]

RUN_FOLDER is a finished run of ``defense=mmdf``; its victim must lie in the ``victims`` folder beside it. Nothing is learned: the
example images of the run go through the victim and through its copy with the bounds that the run saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from marginclip.clipping import BoundedNetwork
from marginclip.experiment.recipe import find_victim
from marginclip.experiment.setup import build_setup
from marginclip.experiment.spec import run_spec
from marginclip.maxmargin import margin_drop
from marginclip.record import read_record
from marginclip.reporting.figures import read_arrays, save_png
from marginclip.reporting.style import AFTER, TRIGGERED, new_figure

COLUMNS = 4


@torch.no_grad()
def decisions(folder: Path, images: Tensor) -> tuple[list[int], list[int], list[bool]]:
    """The model's decisions about images (N, C, H, W), the best other class under the bounds, and which are flagged."""
    record = read_record(folder)
    spec = run_spec(record.config | {"runs_dir": str(folder.parent)})
    model = build_setup(spec).model.eval()
    model.load_state_dict(load_file(find_victim(spec).weights))
    repaired = BoundedNetwork(model, images[0])
    repaired.load_bounds(load_file(folder / "bounds.safetensors"))
    logits, bounded = model(images), repaired(images)
    decided = logits.argmax(1)
    others = bounded.scatter(1, decided.unsqueeze(1), float("-inf")).argmax(1)
    flagged = margin_drop(logits, bounded) > (record.detector or {})["threshold"]
    return decided.tolist(), others.tolist(), flagged.tolist()


def draw(folder: Path, output: Path) -> None:
    """One column an image, of the first that the model decides rightly: clean above, with the trigger below."""
    arrays = read_arrays(folder / "arrays.safetensors")
    rows = {kind: torch.from_numpy(arrays[f"examples/{kind}"]) for kind in ("clean", "triggered")}
    found = {kind: list(zip(*decisions(folder, images), strict=True)) for kind, images in rows.items()}
    labels = arrays["examples/labels"]
    shown = [place for place, (decided, *_) in enumerate(found["clean"]) if decided == labels[place]][:COLUMNS]
    figure = new_figure(2.0 * COLUMNS, 5.2, "A poisoned classifier of digits, and what MMDF makes of it")
    for row, (kind, images) in enumerate(rows.items()):
        for column, place in enumerate(shown):
            decided, other, flagged = found[kind][place]
            axes = figure.add_subplot(2, COLUMNS, row * COLUMNS + column + 1)
            axes.imshow(np.moveaxis(images[place].numpy(), 0, -1), vmin=0, vmax=1, interpolation="nearest")
            says = f"model: {decided}\n" + (f"flagged, corrected: {other}" if flagged else "not flagged")
            axes.set_title(says, fontsize=10, color=TRIGGERED if flagged else AFTER)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(kind, fontsize=12)
    save_png(figure, output)


def main() -> None:
    """Draw from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/figures/start.png"))
    arguments = parser.parse_args()
    draw(arguments.run, arguments.output)


if __name__ == "__main__":
    main()
