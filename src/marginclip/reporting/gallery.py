"""The triggers of several attacks side by side: clean image, triggered image, and the difference made visible."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from marginclip.errors import require
from marginclip.files import write_whole
from marginclip.record import RunRecord
from marginclip.reporting.examples import TIMES, amplification
from marginclip.reporting.figures import read_arrays, save_png
from marginclip.reporting.rows import success_before
from marginclip.reporting.style import Arrays, new_figure

ORDER = (
    "badnet", "blend", "chessboard", "wanet", "input_aware", "clean_label", "adaptive", "sinusoid", "blend_full", "low_frequency",
    "one_pixel",
)  # fmt: skip
IMAGES = 2  # of each attack, so that a trigger that depends on the image shows


def draw_gallery(records: Iterable[RunRecord], path: Path) -> Path:
    """Write the gallery of the runs' attacks to the PNG ``path``.

    One run for each attack: of those with example images an all2one run before others, then the lowest seed; a failed attack
    only where there is no other. Raises :class:`UserError` when no run has example images.
    """
    require(not path.is_dir(), f"--gallery must be a file, but '{path}' is a folder")
    chosen: dict[str, tuple[RunRecord, Arrays]] = {}
    for record in sorted(records, key=_preference):
        attack = _attack(record)
        if attack not in chosen and _has_examples(arrays := read_arrays(record.folder / "arrays.safetensors")):
            chosen[attack] = (record, arrays)
    require(bool(chosen), "there is no run with example images of an attack to make a gallery of")
    figure = gallery_figure([chosen[attack] for attack in sorted(chosen, key=_place)])
    return write_whole(path, partial(save_png, figure))


def gallery_figure(runs: list[tuple[RunRecord, Arrays]]) -> Figure:
    """A block of up to ``IMAGES`` columns for each run; ``examples/clean`` and ``examples/triggered`` (n, C, H, W) in [0, 1]."""
    figure = new_figure(0.6 + 2.7 * max(len(runs), 2), 4.9, "Triggers")
    for part, (record, arrays) in zip(figure.subfigures(1, len(runs), squeeze=False)[0], runs, strict=True):
        clean, triggered = (arrays[f"examples/{kind}"][:IMAGES] for kind in ("clean", "triggered"))
        difference = np.abs(triggered - clean)
        factor = amplification(float(difference.max()))
        part.suptitle(_heading(record), fontsize=11)
        axes = part.subplots(3, len(clean), squeeze=False)
        names = ("clean", "triggered", f"|difference| {TIMES} {factor:g}")
        for row, name, images in zip(axes, names, (clean, triggered, np.clip(difference * factor, 0, 1)), strict=True):
            row[0].set_ylabel(name, fontsize=9)
            for cell, image in zip(row, images, strict=True):
                cell.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                cell.set_xticks([])
                cell.set_yticks([])
    return figure


def _heading(record: RunRecord) -> str:
    """The attack and, where it was measured, its success rate before any repair."""
    success = success_before(record)
    return _attack(record) if success is None else f"{_attack(record)}\nASR {100 * success:.1f} %"


def _attack(record: RunRecord) -> str:
    return str(record.choice("attack"))


def _place(attack: str) -> tuple[int, str]:
    """Where an attack stands: those of ``ORDER`` first, others by name behind them."""
    return (ORDER.index(attack) if attack in ORDER else len(ORDER)), attack


def _preference(record: RunRecord) -> tuple[bool, bool, int, str]:
    return record.status != "done", record.choice("x2x") != "all2one", record.seed, str(record.folder)


def _has_examples(arrays: Arrays) -> bool:
    clean, triggered = arrays.get("examples/clean"), arrays.get("examples/triggered")
    if clean is None or triggered is None or not len(clean):
        return False
    return clean.shape == triggered.shape and clean.shape[1] in (1, 3)
