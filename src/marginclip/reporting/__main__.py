"""``python -m marginclip.reporting RUNS_DIR [--output FILE] [--figures] [--gallery FILE]``: the summary of all runs below a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from marginclip.errors import UserError, require
from marginclip.files import write_whole
from marginclip.reporting.figures import draw_figures
from marginclip.reporting.gallery import draw_gallery
from marginclip.reporting.summary import load_records, summarise


def main(arguments: list[str] | None = None) -> int:
    """Print the summary; the exit status is 0, or 1 after a one-line message on the standard error."""
    parser = argparse.ArgumentParser(prog="python -m marginclip.reporting", description="Summarise all runs below a folder.")
    parser.add_argument("runs_dir", type=Path, metavar="RUNS_DIR", help="folder that holds the run folders, at any depth")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the summary, as Markdown, to this file")
    parser.add_argument("--figures", action="store_true", help="redraw the figures of every run folder")
    parser.add_argument("--gallery", type=Path, metavar="FILE", help="draw the triggers of all attacks side by side, as a PNG")
    options = parser.parse_args(arguments)
    try:
        return report(options.runs_dir, output=options.output, figures=options.figures, gallery=options.gallery)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def report(runs_dir: Path, *, output: Path | None, figures: bool, gallery: Path | None = None) -> int:
    """Print, and on request write, the summary, draw the gallery and redraw the figures; 1 if the figures of a run could not be drawn.

    Raises :class:`UserError` when there is no such folder, no readable record in it, or nothing to make a gallery of.
    """
    require(runs_dir.is_dir(), f"there is no folder '{runs_dir}'")
    records = load_records(runs_dir)
    require(bool(records), f"there is no run.json of a run in '{runs_dir}' or below it")
    text = summarise(records)
    print(text, end="")
    if output is not None:
        require(not output.is_dir(), f"--output must be a file, but '{output}' is a folder")
        write_whole(output, lambda partial: _write_text(partial, text))
    if gallery is not None:
        print(f"{draw_gallery(records, gallery)}", file=sys.stderr)
    return max([redraw(Path(record["path"])) for record in records], default=0) if figures else 0


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
