"""``python -m marginclip.reporting RUNS_DIR``: the summary of all runs below a folder, and figures across them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from marginclip.errors import UserError, require
from marginclip.files import write_whole
from marginclip.record import RunRecord
from marginclip.reporting.comparisons import draw_lambdas, draw_over_training
from marginclip.reporting.figures import draw_figures
from marginclip.reporting.gallery import draw_gallery
from marginclip.reporting.published import published_table
from marginclip.reporting.summary import load_records, summarise

Drawing = Callable[[list[RunRecord], Path], Path]
# Option -> what draws its PNG from all records, and what that shows.
ACROSS: dict[str, tuple[Drawing, str]] = {
    "gallery": (draw_gallery, "draw the triggers of all attacks side by side, as a PNG"),
    "over-training": (
        draw_over_training,
        "draw per-class accuracy after short and long training, before and after repair, as a PNG",
    ),
    "lambdas": (draw_lambdas, "draw per-class accuracy for each lambda of a sweep, as a PNG"),
}


def main(arguments: list[str] | None = None, *, prog: str = "python -m marginclip.reporting") -> int:
    """Print the summary; the exit status is 0, or 1 after a one-line message on the standard error.

    ``arguments`` are those of the command line, of which ``prog`` is what comes before them.
    """
    parser = argparse.ArgumentParser(prog=prog, description="Summarise all runs below a folder.")
    parser.add_argument("runs_dir", type=Path, metavar="RUNS_DIR", help="folder that holds the run folders, at any depth")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the summary, as Markdown, to this file")
    parser.add_argument("--figures", action="store_true", help="redraw the figures of every run folder")
    parser.add_argument("--published", metavar="TABLE", help="print a table of the first paper beside ours, such as table1")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="DIR_OR_FILE",
        help="write a dashboard that opens offline: a folder of pages, or one file where the name ends in .html",
    )
    parser.add_argument("--single-file", action="store_true", help="with --html DIR: write one file, DIR/index.html")
    parser.add_argument("--no-pictures", action="store_true", help="with --html: leave images out")
    for option, (_, help_text) in ACROSS.items():
        parser.add_argument(f"--{option}", dest=option, type=Path, metavar="FILE", help=help_text)
    options = parser.parse_args(arguments)
    wanted = {option: path for option in ACROSS if (path := vars(options)[option]) is not None}
    try:
        require(options.html is not None or not options.single_file, "--single-file needs --html DIR")
        require(options.html is not None or not options.no_pictures, "--no-pictures needs --html DIR_OR_FILE")
        status = report(
            options.runs_dir, output=options.output, figures=options.figures, across=wanted, published=options.published
        )
        if options.html is not None:
            from marginclip.reporting.dashboard import write_dashboard

            pictures = not options.no_pictures
            opened = write_dashboard(options.runs_dir, options.html, single_file=options.single_file, pictures=pictures)
            print(f"open {opened.resolve().as_uri()}", file=sys.stderr)
        return status
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def report(runs_dir: Path, *, output: Path | None, figures: bool, across: dict[str, Path], published: str | None = None) -> int:
    """Print, and on request write, the summary, or a ``published`` table beside ours; draw figures.

    Figures ``across`` runs are an option of ``ACROSS`` -> PNG; ``figures`` redraws those of every run. Returns 1 if the figures of a run
    could not be drawn.

    Raises :class:`UserError` when there is no such folder, no readable record in it, or none that serves a figure across runs.
    """
    require(runs_dir.is_dir(), f"there is no folder '{runs_dir}'")
    records = load_records(runs_dir)
    require(bool(records), f"there is no run.json that can be read in '{runs_dir}' or below it")
    text = summarise(records) if published is None else published_table(published, records)
    print(text, end="")
    if output is not None:
        require(not output.is_dir(), f"--output must be a file, but '{output}' is a folder")
        write_whole(output, lambda partial: _write_text(partial, text))
    for option, path in across.items():
        draw, _ = ACROSS[option]
        print(f"{draw(records, path)}", file=sys.stderr)
    return max([redraw(record.folder) for record in records], default=0) if figures else 0


def redraw(folder: Path) -> int:
    """Draw the figures of one run and name them on the standard error; 1, after a message, if that cannot be done."""
    try:
        written = draw_figures(folder)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {', '.join(path.name for path in written) or 'nothing to draw'}", file=sys.stderr)
    return 0


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
