"""Draw the pictures of docs/walk-through.md: runs every block of the page as it stands, and shows what the audit and the scan then say.

    python benchmarks/walk_through_pictures.py [--output docs/figures]

Some minutes on two CPU cores. Needs Debian's ``chromium``, and playwright, onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from marginclip.reporting.figures import save_png
from marginclip.reporting.style import AFTER, TRIGGERED, new_figure

PAGE = Path(__file__).parents[1] / "docs" / "walk-through.md"
COLUMNS = 6


def run_page(folder: Path) -> None:
    """All Python blocks are one program, as for a reader, and wait for the commands between them."""
    blocks = re.findall(r"```(python|bash)\n(.*?)```", PAGE.read_text(), flags=re.S)
    program = ["import subprocess"]
    for kind, block in blocks:
        commands = [line.replace("marginclip", f"{sys.executable} -m marginclip", 1) for line in block.strip().splitlines()]
        program += (
            [block] if kind == "python" else [f"assert subprocess.call({line!r}, shell=True) in (0, 3)" for line in commands]
        )
    (folder / "page.py").write_text("\n".join(program))
    subprocess.run(
        [sys.executable, "page.py"], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def draw_scan(folder: Path, output: Path) -> None:
    """Images from use, as many without as with the trigger: what the model decides and what the detector makes of it."""
    rows = list(csv.DictReader((folder / "rows.csv").open()))
    # Every third image of a class has the trigger.
    numbered = [(int(Path(row["path"]).stem) % 3 == 0, row) for row in rows]
    shown = {
        kind: [row for marked, row in numbered if marked == kind][4 :: len(rows) // (3 * COLUMNS)][:COLUMNS]
        for kind in (False, True)
    }
    figure = new_figure(1.7 * COLUMNS, 4.6, "Images from use: clean ones above, with the trigger below")
    for line, (_, chosen) in enumerate(shown.items()):
        for column, row in enumerate(chosen):
            axes = figure.add_subplot(2, COLUMNS, line * COLUMNS + column + 1)
            axes.imshow(Image.open(folder / row["path"]), cmap="grey", vmin=0, vmax=255, interpolation="nearest")
            flagged = row["flagged"] == "True"
            says = f"model: {row['decision']}\n" + (f"flagged, now {row['corrected']}" if flagged else "not flagged")
            axes.set_title(says, fontsize=9, color=TRIGGERED if flagged else AFTER)
            axes.set_xticks([])
            axes.set_yticks([])
    save_png(figure, output)


def photograph(page: Path, output: Path, *, height: int) -> None:
    """The top of an HTML page, as Chromium shows it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1000, "height": height})
        shown.goto(page.as_uri())
        shown.screenshot(path=output)
        browser.close()


def main() -> None:
    """Draw from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run_page(folder)
        draw_scan(folder, arguments.output / "walk_through_scan.png")
        photograph(folder / "audited" / "audit.html", arguments.output / "walk_through_audit.png", height=1150)


if __name__ == "__main__":
    main()
