"""The runs of a dashboard: what each is called in addresses, and which of its rows stands for it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marginclip.errors import UserError
from marginclip.record import RunRecord, find_records, read_record

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
KEPT = 60


@dataclass(frozen=True)
class Run:
    """A record with its ``slug``, which is safe in an address and as the name of a file, and the ``place`` of its folder."""

    record: RunRecord
    slug: str
    place: str

    @property
    def main_row(self) -> str | None:
        """The row that stands for the run: the one named as its defense, else the repaired network, else the model as given."""
        rows = (self.record.choice("defense"), self.record.repaired_row, "none")
        return next((row for row in rows if row is not None and row in self.record.metrics), None)

    @property
    def victim(self) -> str:
        """What identifies the model as given: its folder in the store, its file, or the run itself where neither is known."""
        source = self.record.victim
        return self.place if source is None else source.folder or source.path or self.place


def read_runs(runs_dir: Path) -> tuple[list[Run], list[str]]:
    """The runs below ``runs_dir``, in the order of their paths, and for each record that cannot be read one sentence that says why."""
    runs: list[Run] = []
    unreadable: list[str] = []
    taken: set[str] = set()
    for folder in find_records(runs_dir):
        try:
            record = read_record(folder)
        except UserError as error:
            unreadable.append(str(error))
            continue
        place = str(folder.relative_to(runs_dir))
        slug = slug_of(folder.name, place, taken)
        taken.add(slug)
        runs.append(Run(record, slug, folder.name if place == "." else place))
    return runs, unreadable


def slug_of(name: str, place: str, taken: set[str]) -> str:
    """``name`` where it is plain and not ``taken``; else what of it is plain, and a digest of ``place``."""
    if PLAIN.fullmatch(name) and name not in taken:
        return name
    kept = re.sub(r"[^A-Za-z0-9_-]+", "-", name[:KEPT]).strip("-") or "run"
    return f"{kept}-{hashlib.sha256(place.encode(errors='surrogatepass')).hexdigest()[:10]}"


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested settings by dotted key, as text: words as they are, everything else as JSON."""
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from flat(entry, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)
