"""Every notebook runs from top to bottom, in this process: a kernel for each would import torch again."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PRINTS = {"repair_your_model": "MMDF", "detect_triggers": "flagged", "long_tail": "MMOM", "add_a_defense": "hush"}
MOST_OUTPUT = 8_000  # characters


def printed_by(notebook: nbformat.NotebookNode) -> str:
    """What its cells print; ``%pip`` and the like are Python that is never reached, as the package is there."""
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(TransformerManager().transform_cell(cell.source), names)
    return printed.getvalue()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    assert PRINTS[path.stem] in printed_by(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_installs_and_is_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "%pip install marginclip" in first.source
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert all(output.output_type == "stream" for output in outputs)
    assert 0 < sum(len(output.text) for output in outputs) < MOST_OUTPUT
    assert PRINTS[path.stem] in "".join(output.text for output in outputs)


def test_there_are_the_four_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(PRINTS)
