"""The figures of one run folder, drawn from its files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file

from marginclip.errors import UserError
from marginclip.files import write_whole
from marginclip.record import read_record
from marginclip.reporting.activations import activation_figures
from marginclip.reporting.classes import class_figures
from marginclip.reporting.confusion import confusion_figures
from marginclip.reporting.detection import detection_figures
from marginclip.reporting.examples import example_figures
from marginclip.reporting.inverted import inverted_figures
from marginclip.reporting.learning import learning_figures
from marginclip.reporting.margins import margin_figures
from marginclip.reporting.reliability import reliability_figures
from marginclip.reporting.style import Arrays

# Each makes the figures, by file stem, for which the record and the arrays hold what they need.
DRAWERS = (
    example_figures,
    activation_figures,
    detection_figures,
    learning_figures,
    margin_figures,
    inverted_figures,
    class_figures,
    confusion_figures,
    reliability_figures,
)


def draw_figures(folder: Path) -> list[Path]:
    """Draw what ``run.json`` and ``arrays.safetensors`` in ``folder`` allow; returns the paths of the PNGs.

    They are in ``folder/figures/``: ``examples.png``, ``activations.png``, ``detection_<detector>.png`` for each detector,
    ``learning.png``, ``maximum_margins.png``, ``inverted_trigger.png``, ``class_accuracy.png``, ``confusion.png`` and
    ``reliability.png``. A figure whose data the files do not hold is left out.
    Raises :class:`UserError` when there is no run.json or a file cannot be read.
    """
    folder = Path(folder)
    record, arrays = read_record(folder), read_arrays(folder / "arrays.safetensors")
    figures = {stem: figure for draw in DRAWERS for stem, figure in draw(record, arrays).items()}
    return [write_whole(folder / "figures" / f"{stem}.png", partial(save_png, figure)) for stem, figure in figures.items()]


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    figure.savefig(path, format="png")


def read_arrays(path: Path) -> Arrays:
    """The arrays of a run as float32; an empty dictionary when there is no such file."""
    if not path.exists():
        return {}
    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
