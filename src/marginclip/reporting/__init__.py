"""Tables, summaries and figures of finished runs.

Everything here is made from what a run leaves: its record (:mod:`marginclip.record`) and ``arrays.safetensors``.

- :func:`result_table`, :func:`print_table`: the metrics of one run, for the terminal.
- :func:`load_records`, :func:`summarise`: the runs below a folder, as means over seeds in Markdown.
- :func:`published_table`: a table of the first paper beside ours.
- :func:`draw_figures`: the PNGs of one run folder.
- :func:`draw_gallery`, :func:`draw_over_training`, :func:`draw_lambdas`: a figure from many runs.

On the command line: ``python -m marginclip.reporting RUNS_DIR [--output FILE] [--figures]`` with ``[--gallery FILE]``,
``[--over-training FILE]`` and ``[--lambdas FILE]`` for the figures from many runs, ``[--published TABLE]`` for the paper's tables.
"""

from marginclip.reporting.comparisons import draw_lambdas, draw_over_training
from marginclip.reporting.detection import area_under, roc_curve
from marginclip.reporting.figures import draw_figures
from marginclip.reporting.gallery import draw_gallery
from marginclip.reporting.published import published_table
from marginclip.reporting.summary import load_records, summarise
from marginclip.reporting.tables import print_table, result_table

__all__ = [
    "area_under",
    "draw_figures",
    "draw_gallery",
    "draw_lambdas",
    "draw_over_training",
    "load_records",
    "print_table",
    "published_table",
    "result_table",
    "roc_curve",
    "summarise",
]
