"""The triggers that Neural Cleanse inverted: masks, and what they paste."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from marginclip.record import RunRecord
from marginclip.reporting.rows import describe
from marginclip.reporting.style import Arrays, new_figure

MAX_CLASSES = 10


def inverted_figures(record: RunRecord, arrays: Arrays) -> dict[str, Figure]:
    """``inverted_trigger`` from ``inverted/masks`` (n, 1, H, W), ``inverted/patterns`` (n, C, H, W) and ``inverted/classes`` (n,).

    Upper row the masks, lower row mask times pattern, values in [0, 1] as they are used, never stretched; of more than ten
    classes, those of the smallest masks.
    """
    names = ("inverted/masks", "inverted/patterns", "inverted/classes")
    if any(name not in arrays for name in names) or arrays[names[1]].shape[1] not in (1, 3):
        return {}
    masks, patterns, classes = (arrays[name] for name in names)
    sizes = np.abs(masks).sum((1, 2, 3))
    shown = np.sort(np.argsort(sizes, kind="stable")[:MAX_CLASSES])
    figure = new_figure(1.5 + 1.35 * max(len(shown), 3), 4.2, f"Inverted trigger: {describe(record)}")
    rows = {"mask": masks, "mask \N{MULTIPLICATION SIGN} pattern": masks * patterns}
    for row, (name, images) in enumerate(rows.items()):
        for column, number in enumerate(shown):
            axes = figure.add_subplot(2, len(shown), row * len(shown) + column + 1)
            image = images[number].transpose(1, 2, 0)
            image = image[..., 0] if row == 0 else image
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(f"{_heading(record, int(classes[number]))}\n|m| = {sizes[number]:.1f}", fontsize=9)
            if column == 0:
                axes.set_ylabel(name, fontsize=11)
    return {"inverted_trigger": figure}


def _heading(record: RunRecord, number: int) -> str:
    name = record.class_name(number)
    return f"{name} (suspect)" if number in record.findings.get("suspects", []) else name
