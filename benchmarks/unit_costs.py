"""What a run costs and how much it fills: medians over the runs below a folder, by data set and model.

python benchmarks/unit_costs.py runs
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path

from marginclip.record import RunRecord
from marginclip.reporting import load_records

PHASES = ("victim", "repair", "detector", "evaluation", "detection")


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs_dir", type=Path)
    given = parser.parse_args()
    groups: dict[tuple[str | None, str | None], list[RunRecord]] = {}
    for record in load_records(given.runs_dir):
        groups.setdefault((record.choice("dataset"), record.choice("model")), []).append(record)
    print(f"| data set | model | runs | MB | {' | '.join(f'{phase} s' for phase in PHASES)} |")
    print("|---|---|" + "---:|" * (2 + len(PHASES)))
    for (dataset, model), records in groups.items():
        megabytes = statistics.median(size(record.folder) for record in records) / 1e6
        seconds = [median(record.seconds[phase] for record in records if phase in record.seconds) for phase in PHASES]
        print(f"| {dataset} | {model} | {len(records)} | {megabytes:.2f} | {' | '.join(seconds)} |")
    victims = [size(file.parent) for file in (given.runs_dir / "victims").glob("*/victim.json")]
    if victims:
        print(f"\n{len(victims)} victims: {min(victims) / 1e6:.2f} to {max(victims) / 1e6:.2f} MB each")


def size(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def median(values: Iterable[float]) -> str:
    """The median with one decimal; "-" of none."""
    found = list(values)
    return f"{statistics.median(found):.1f}" if found else "-"


if __name__ == "__main__":
    main()
