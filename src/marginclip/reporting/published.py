"""A table of the first paper beside ours: means with standard errors, the paper's figures, and paired tests between methods."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from marginclip.errors import UserError, nearest
from marginclip.record import RunRecord
from marginclip.reporting.groups import LEFT_OUT, named
from marginclip.reporting.rows import label, metric
from marginclip.reporting.summary import mixed

FILE = Path(__file__).with_name("published.csv")
SHOWN = ("ACC", "ASR", "PACC")
REFERENCE = "mmdf"  # what the other methods are compared with
EXACT = 16  # up to so many victims all signs are tried
DRAWS = 20_000


@dataclass(frozen=True, order=True)
class Cell:
    """What a column of a table is about; ``dataset`` is empty in a table of one data set, ``beta`` where no attack has one."""

    dataset: str
    attack: str
    x2x: str
    beta: str

    @property
    def title(self) -> str:
        """In words."""
        parts = (self.dataset, self.attack, self.x2x if self.x2x != "-" else "", f"beta {self.beta}" if self.beta else "")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Figure:
    """A mean over models in percent, and the sample deviation, where the paper gives it."""

    mean: float
    deviation: float | None


Published = dict[tuple[Cell, str, str], Figure]  # by cell, row and metric
Runs = dict[tuple[Cell, str], list[RunRecord]]  # by cell and row


def figures() -> list[dict[str, str]]:
    """All figures of the first paper, as the lines of ``published.csv``."""
    with FILE.open(newline="") as lines:
        return list(csv.DictReader(lines))


def published(table: str) -> Published:
    """The paper's figures; raises :class:`UserError` for a table that is not known."""
    every = figures()
    names = sorted({line["table"] for line in every})
    chosen = [line for line in every if line["table"] == table]
    if not chosen:
        raise UserError(f"'{table}' is no table of the paper{nearest(table, names)} (there are {', '.join(names)})")
    several = len({line["dataset"] for line in chosen}) > 1
    return {
        (
            Cell(line["dataset"] if several else "", line["attack"], line["x2x"], line["beta"]), line["row"], line["metric"].upper()
        ): Figure(float(line["mean"]), float(line["deviation"]) if line["deviation"] else None)
        for line in chosen
    }  # fmt: skip


def published_table(table: str, records: Iterable[RunRecord]) -> str:
    """The table as Markdown: ours ± standard error over victims, in brackets the paper's and the difference; then paired tests.

    Records whose attack failed, and failed ones, are in no mean and are listed. Raises :class:`UserError` for an unknown table.
    """
    paper = published(table)
    several = any(cell.dataset for cell, _, _ in paper)
    runs: Runs = {}
    left_out = []
    for record in records:
        if record.status in LEFT_OUT:
            left_out.append(f"- {cell_of(record, several).title}, seed {record.seed}: {LEFT_OUT[record.status]}")
            continue
        for row in record.metrics:
            runs.setdefault((cell_of(record, several), row), []).append(record)
    parts = [f"# {table.replace('table', 'Table ')} of the first paper", "\n".join(_main_lines(paper, runs))]
    tests = list(_test_lines(runs))
    if tests:
        parts += [f"Differences to {REFERENCE} on the same victims, in points; p by flipping signs:", "\n".join(tests)]
    notes = [mixed((cell.title, row), records) for (cell, row), records in runs.items() if row != "none"]
    if any(notes):
        parts.append("Mixed settings:\n\n" + "\n".join(f"- {note}" for note in notes if note))
    if left_out:
        parts.append("Left out of the means:\n\n" + "\n".join(dict.fromkeys(left_out)))
    return "\n\n".join(parts) + "\n"


def cell_of(record: RunRecord, several: bool) -> Cell:
    """The cell of a run; ``several`` data sets are told apart."""
    attack, beta = named(record, "attack"), record.setting("attack.beta")
    x2x = "-" if attack == "none" else named(record, "x2x")
    return Cell(named(record, "dataset") if several else "", attack, x2x, "" if beta is None else f"{float(beta):g}")


def one_a_victim(records: list[RunRecord], row: str, heading: str) -> dict[str, float]:
    """A metric in percent by victim; the model as given, which every method's run measures, counts once."""
    found = {_victim(record): metric(record, row, heading) for record in records}
    return {victim: 100 * value for victim, value in found.items() if value is not None}


def sign_flip_p(differences: list[float]) -> float:
    """The two-sided p-value of a mean difference of 0: the share of sign choices whose mean is as far from 0 or farther.

    All choices for up to ``EXACT`` differences, else ``DRAWS`` random ones with a fixed seed and the one that was seen.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) <= EXACT:
        signs = np.array(list(product((1, -1), repeat=len(values))))
    else:
        drawn = np.random.default_rng(0).choice((1, -1), size=(DRAWS, len(values)))
        signs = np.concatenate([np.ones((1, len(values))), drawn])
    means = np.abs(signs @ values)
    return float((means >= abs(values.sum()) - 1e-9).mean())


def _main_lines(paper: Published, runs: Runs) -> Iterator[str]:
    yield "| attack | method | victims | ACC % | ASR % | PACC % |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    cells = list(dict.fromkeys(cell for cell, _, _ in paper)) + sorted(
        {cell for cell, _ in runs} - {cell for cell, _, _ in paper}
    )
    for cell in cells:
        order = dict.fromkeys([row for other, row, _ in paper if other == cell] + [row for other, row in runs if other == cell])
        for row in order:
            records = runs.get((cell, row), [])
            ours = {heading: list(one_a_victim(records, row, heading).values()) for heading in SHOWN}
            texts = [_entry(ours[heading], paper.get((cell, row, heading))) for heading in SHOWN]
            name = label(records[0], row) if records else row
            yield f"| {cell.title} | {name} | {len(ours['ACC'])} | {' | '.join(texts)} |"


def _entry(values: list[float], figure: Figure | None) -> str:
    """Ours, with the standard error of several victims, and in brackets the paper's and the difference."""
    theirs = "" if figure is None else f"{figure.mean:.1f}"
    if not values:
        return f"- ({theirs})" if theirs else "-"
    mean = statistics.fmean(values)
    text = f"{mean:.1f}" + (f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else "")
    return text if figure is None else f"{text} ({theirs}, {mean - figure.mean:+.1f})"


def _test_lines(runs: Runs) -> Iterator[str]:
    """Each method against ``REFERENCE`` in every cell, and in all cells together."""
    lines = []
    methods = list(dict.fromkeys(row for _, row in runs if row not in ("none", REFERENCE)))
    for row in methods:
        cells = sorted({cell for cell, other in runs if other == row})
        for chosen, title in [*(([cell], cell.title) for cell in cells), (cells, "all")]:
            found = {heading: [gap for cell in chosen for gap in _gaps(runs, cell, row, heading)] for heading in SHOWN[:2]}
            if len(found["ACC"]) > 1 and (title != "all" or len(cells) > 1):
                lines.append(f"| {row} | {title} | {len(found['ACC'])} | {' | '.join(_gap(found[key]) for key in found)} |")
    if lines:
        yield "| method | attack | victims | ACC | ASR |"
        yield "| --- | --- | ---: | ---: | ---: |"
        yield from lines


def _gaps(runs: Runs, cell: Cell, row: str, heading: str) -> list[float]:
    """The differences of a method to ``REFERENCE`` on each victim that both were run on."""
    ours = one_a_victim(runs.get((cell, row), []), row, heading)
    reference = one_a_victim(runs.get((cell, REFERENCE), []), REFERENCE, heading)
    return [ours[victim] - reference[victim] for victim in ours if victim in reference]


def _gap(differences: list[float]) -> str:
    if not differences:
        return "-"
    return f"{statistics.fmean(differences):+.1f} (p = {sign_flip_p(differences):.3f})"


def _victim(record: RunRecord) -> str:
    """What the runs of one victim share."""
    source = record.victim
    if source is None:
        return str(record.seed)
    return Path(source.folder).name if source.folder else str(source.path or record.seed)  # folders by any path to them
