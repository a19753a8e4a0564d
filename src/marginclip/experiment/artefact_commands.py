"""``marginclip scan`` and ``marginclip export``: what is done with a repaired artefact."""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from marginclip.errors import UserError, printable, require
from marginclip.experiment.checkpoints import load_checkpoint
from marginclip.experiment.objects import make_model
from marginclip.files import write_whole
from marginclip.networks.layout import channels_last
from marginclip.service import Artefact, ScannedImage, export, read_artefact, scan
from marginclip.service.artefact import Description
from marginclip.service.scan import image_files
from marginclip.service.verdict import UNTESTED

OWN_MODELS = (
    "marginclip.models.ResNet",
    "marginclip.models.PreActResNet",
    "marginclip.models.VGG",
    "marginclip.models.ViT",
    "marginclip.models.TorchvisionModel",
    "marginclip.models.timm_model",
    "marginclip.models.huggingface_model",
)
# What Hydra acts on, and arguments of timm that read or download further files.
ODD_KEYS = ("_", "pretrained", "checkpoint_path")


def main(command: str, arguments: list[str]) -> int:
    """Run one of the commands; returns its exit status: 0, or 1 after a mistake, which is told in one sentence.

    Where whoever reads the rows has enough, such as ``head``, it ends with the status of SIGPIPE and says nothing.
    """
    try:
        return _scan(arguments) if command == "scan" else _export(arguments)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is not written yet goes nowhere when Python ends
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"error: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}", file=sys.stderr)
    return 1


def open_artefact(folder: str, *, model_path: str | None = None, trust_code: bool = False) -> Artefact:
    """The artefact in ``folder`` with its model, made anew from the settings there and loaded from its checkpoint.

    An artefact can name any Python code as its architecture, at any depth of its settings: code that is not the project's own runs only
    with ``trust_code``. Without it the settings are checked before anything is imported.
    """
    description = read_artefact(folder)
    model = _model(description, folder, model_path, trust_code=trust_code)
    return Artefact.load(folder, model)


def _model(description: Description, folder: str, model_path: str | None, *, trust_code: bool) -> nn.Module:
    settings: Mapping[str, Any] = description.model or {}
    target = settings.get("_target_")
    require(
        isinstance(target, str),
        f"the artefact '{folder}' does not say how its model is made: it was written from Python, so load it with Artefact.load",
    )
    require(
        trust_code or target in OWN_MODELS,
        f"the artefact '{folder}' makes its model with '{settings.get('target', target)}', code that is not marginclip's: "
        "--trust-code runs it",
    )
    odd = next(_odd_words({name: value for name, value in settings.items() if name != "_target_"}), None)
    require(
        trust_code or odd is None,
        f"the artefact '{folder}' has '{str(odd)[:60]}' in the settings of its model, which can run code or load files that are not "
        "marginclip's: --trust-code allows that",
    )
    path = model_path or description.model_path
    require(path is not None, f"the artefact '{folder}' does not say where its model is: give --model FILE")
    require(
        Path(str(path)).exists(),
        f"the model '{path}' of the artefact '{folder}' is not there: give its file with --model FILE",
    )
    channels = description.image_shape[0]
    if settings.get("path") == description.model_path:  # the model brings its weights: from where they are now
        settings = {**settings, "path": path}
    model = make_model(settings, num_classes=len(description.classes), in_channels=channels)
    if getattr(model, "loaded_from", None) != path:
        load_checkpoint(path, model, key="--model" if model_path else "model_path")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    channels_last(model.eval()).to(device)
    return model


def _odd_words(settings: Any) -> Iterator[str]:
    """What can make more of settings than numbers and words, at any depth: keys of ``ODD_KEYS``, and interpolations."""
    if isinstance(settings, str) and "${" in settings:
        yield settings
    elif isinstance(settings, Mapping):
        for key, value in settings.items():
            if key.startswith(ODD_KEYS):
                yield key
            yield from _odd_words(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _odd_words(value)


def _scan(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="marginclip scan", description="Decide about images with a repaired model: one row each.", allow_abbrev=False
    )
    parser.add_argument("artefact", help="the folder that marginclip repair wrote")
    parser.add_argument("images", nargs="+", help="files and folders; - reads names from the standard input, one a line")
    parser.add_argument("--model", help="the model's file, where it is no longer where the artefact says")
    parser.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="of the rows")
    parser.add_argument("--output", help="write rows to this file instead of the standard output")
    parser.add_argument("--json", action="store_true", help="rows as JSON lines, and the summary as JSON")
    parser.add_argument("--resize", action="store_true", help="scale and cut images of other sizes instead of naming them")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--trust-code", action="store_true", help="run code that the artefact names to make its model")
    given = parser.parse_args(arguments)
    artefact = open_artefact(given.artefact, model_path=given.model, trust_code=given.trust_code)
    rows = scan(artefact, image_files(_named(given.images)), batch_size=given.batch_size, resize=given.resize)
    counts = _write_to(given.output, _with_progress(rows), "jsonl" if given.json else given.format)
    print(json.dumps(counts | {"not_tested": UNTESTED}) if given.json else _summary(counts), file=sys.stderr)
    if counts["images"] == 0:
        print("error: no image could be used", file=sys.stderr)
        return 1
    return 0


def _named(inputs: list[str]) -> Iterator[str]:
    for name in inputs:
        if name == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        else:
            yield name


def _with_progress(rows: Iterable[ScannedImage]) -> Iterator[ScannedImage]:
    """The rows, with a count on the terminal of how many there were."""
    if not sys.stderr.isatty():
        yield from rows
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.completed} images"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        for row in rows:
            progress.advance(task)
            yield row


def _write_to(output: str | None, rows: Iterable[ScannedImage], kind: str) -> dict[str, Any]:
    """Write the rows to the file ``output``, which appears whole, or to the standard output as they come; what there was of each kind."""
    if output is None:
        return _write_rows(rows, sys.stdout, kind)
    counts: dict[str, Any] = {}

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            counts.update(_write_rows(rows, file, kind))

    write_whole(Path(output), write)
    return counts


def _write_rows(rows: Iterable[ScannedImage], file: TextIO, kind: str) -> dict[str, Any]:
    names = [each.name for each in fields(ScannedImage)]
    writer = csv.DictWriter(file, names)
    if kind == "csv":
        writer.writeheader()
    counts: dict[str, Any] = {"images": 0, "flagged": 0, "changed": 0, "errors": 0, "flagged_as": {}}
    for row in rows:
        if kind == "csv":
            writer.writerow(asdict(row))
        else:
            file.write(json.dumps(asdict(row)) + "\n")
        if row.error is not None:
            counts["errors"] += 1
            continue
        counts["images"] += 1
        counts["flagged"] += bool(row.flagged)
        counts["changed"] += row.decision != row.corrected
        if row.flagged:
            counts["flagged_as"][row.decision] = counts["flagged_as"].get(row.decision, 0) + 1
    return counts


def _summary(counts: dict[str, Any]) -> str:
    lines = [f"{counts['images']} images, {counts['flagged']} flagged, {counts['changed']} decisions changed"]
    if counts["flagged"]:
        label, most = max(counts["flagged_as"].items(), key=lambda pair: pair[1])
        lines.append(f"most flagged images ({most}) were decided as '{label}'")
    if counts["errors"]:
        lines.append(f"{counts['errors']} files could not be used; their rows say why")
    lines.append(f"no flag is no proof: the detector sees triggers that bounds undo, and no others. {UNTESTED}")
    return "\n".join(lines)


def _export(arguments: list[str]) -> int:
    allowed = ("format", "output", "part", "batch_size", "model")
    folders = [word for word in arguments if "=" not in word and not word.startswith("-")]
    flags = [word for word in arguments if word.startswith("-")]
    usage = (
        "marginclip export ARTEFACT format=onnx|pt2 output=FILE [part=mmdf|repaired] [batch_size=N] [model=FILE] [--trust-code]"
    )
    if flags and flags[0] in ("-h", "--help"):
        print(usage)
        return 0
    require(len(folders) == 1 and set(flags) <= {"--trust-code"}, f"usage: {usage}")
    options = dict(word.split("=", 1) for word in arguments if "=" in word)
    for name in options:
        require(name in allowed, f"unknown option '{name}' (there are {', '.join(allowed)})")
    require("output" in options, f"export needs output=FILE; {usage}")
    size = options.get("batch_size", "")
    require(
        "batch_size" not in options or size.isdecimal(),
        f"batch_size must be a whole number, got '{size}'",
    )
    batch_size = int(size) if size else None
    artefact = open_artefact(folders[0], model_path=options.get("model"), trust_code=bool(flags))
    path = export(
        artefact,
        options["output"],
        format=options.get("format", "onnx"),
        part=options.get("part", "mmdf"),
        batch_size=batch_size,
    )
    print(path)
    return 0
