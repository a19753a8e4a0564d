"""Whether a change of the code changed a number: small exact runs of every attack, defense, loss and kind of victim, as digests.

    python benchmarks/same_numbers.py write before.json      (in the code as it was)
    python benchmarks/same_numbers.py check before.json      (in the code as it is)

Each run is a job of ``train.py`` or ``defend.py`` on digits, a network of width 4, fp32 on the CPU. From its folder come, to the last bit,
the metrics, scores of classes, course of learning, findings, detection, bounds and arrays, and of its victim the weights. ``check`` names
every entry that differs and exits with 1. Digests compare on one machine only: other processors round otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
COMMON = (
    "dataset=digits model.width=4 training.epochs=2 clean_per_class=6 logger=none trainer=exact "
    "trainer.enable_progress_bar=false trainer.threads=1"
)
FIGURES = {"defend": ["figures=false"], "train": []}
POISONED = "attack.min_success=0"
BOUNDS = "defense.steps=4 defense.check_every=2"
ASCENT = "defense.ascent.first_steps=2 defense.ascent.steps=1 defense.ascent.starts_per_class=2"
MMBD = "defense.detection.starts=2 defense.detection.steps=2 defense.detection.simulations=100"
NESTED = " ".join(
    f"defense.{part}.{key}"
    for part in ("mmac", "mmom")
    for key in ("steps=4", "check_every=2", "ascent.first_steps=2", "ascent.steps=1", "ascent.starts_per_class=2")
)
# One command line each; with -m, one run for every combination.
RUNS = {
    "attacks": f"defend -m {POISONED} {BOUNDS} {ASCENT} attack=badnet,blend,chessboard,wanet",
    "no attack": f"defend attack=none {BOUNDS} {ASCENT}",
    "x2x": f"defend -m {POISONED} {BOUNDS} {ASCENT} x2x=one2one,all2all attack=badnet",
    "input-aware": f"defend {POISONED} {BOUNDS} {ASCENT} attack=input_aware attack.mask_epochs=1 attack.width=4",
    "clean-label": f"defend {POISONED} {BOUNDS} {ASCENT} attack=clean_label attack.steps=2 attack.surrogate.epochs=1",
    "adaptive": f"defend attack.base.min_success=0 {BOUNDS} {ASCENT} attack=adaptive attack.rounds=1 attack.epochs_per_round=1 "
    "attack.max_batches=2 attack.defender.steps=2 attack.defender.check_every=1 attack.clean_per_class=6",
    "schedules": f"defend -m {POISONED} defense=mmac defense/schedule=SCHEDULES {BOUNDS} {ASCENT}",
    "paper's detector": f"defend {POISONED} {BOUNDS} {ASCENT} defense/detector=paper",
    "static clip": f"defend {POISONED} defense=static_clip",
    "nothing": f"defend {POISONED} defense=none",
    "mmom": f"defend {POISONED} defense=mmom {BOUNDS} {ASCENT}",
    "mmbm": f"defend {POISONED} defense=mmbm {BOUNDS}",
    "fine-tuning": f"defend -m {POISONED} defense=finetune,fine_pruning,last_layer",
    "nad": f"defend {POISONED} defense=nad defense.epochs=1 defense.teacher_epochs=1",
    "neural cleanse": f"defend -m {POISONED} defense=neural_cleanse defense.inversion.passes=2 defense.inversion.batches_per_pass=2 "
    "defense.suspect_class=known,auto",
    "ibau": f"defend {POISONED} defense=ibau defense.rounds=2",
    "post-hoc": f"defend -m {POISONED} defense=bias_only,temperature_scaling,bias_corrected_temperature,vector_scaling,lws,"
    "tau_normalisation,logit_adjustment",
    "counts known": "defend imbalance=exponential training.batch_size=32 defense=logit_adjustment defense.class_counts=known "
    f"{POISONED} attack=badnet",
    "auto": f"defend {POISONED} defense=auto {NESTED} {MMBD}",
    "auto, mmac": f"defend {POISONED} defense=auto {NESTED} {MMBD} "
    "defense.detection.alpha=0.999 defense.max_cost=1",
    "mm-bd": f"defend {POISONED} defense=none detect=mmbd detect.starts=2 detect.steps=3 detect.simulations=200",
    "long tail": "defend -m training.batch_size=32 imbalance=exponential,step loss=cross_entropy,mixup,ldam,gcl "
    f"defense=mmom {BOUNDS} {ASCENT}",
    "long-tail recipe": "defend imbalance=exponential training=long_tail training.epochs=6 "
    "training.scheduler.warm_up_epochs=1 defense=bias_only",
    "train": "train attack=none seed=1",
    "checkpoint": f"defend victim=checkpoint victim.path=WEIGHTS {BOUNDS} {ASCENT}",
}  # fmt: skip
SCHEDULES = ("fitted_start", "tight_start", "clean_starts", "warm_noise", "algorithm", "authors_code")
OLD_KEYS = {"lambda": "penalty"}  # of a history, in records of schema 1
UNTIMED = re.compile(r"seconds")


def digests(work: Path) -> dict[str, Any]:
    """Do every run below ``work``; the entries of each by the name of its command, the options that vary, and what they are."""
    found: dict[str, Any] = {}
    for name, command in RUNS.items():
        script, _, options = command.partition(" ")
        options = options.replace("SCHEDULES", ",".join(SCHEDULES))
        if "WEIGHTS" in options:
            (weights,) = work.glob("train/victims/*/model.safetensors")
            options = options.replace("WEIGHTS", str(weights))
        runs = work / name.replace(" ", "-").replace(",", "").replace("'", "")
        done = subprocess.run(
            [sys.executable, f"{script}.py", *options.split(), *COMMON.split(), *FIGURES[script], f"runs_dir={runs}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            sys.exit(f"{name}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        print(name, flush=True)
        for victim in sorted(runs.glob("victims/*/victim.json")):
            entry = {
                "metrics": json.loads(victim.read_text())["metrics"], "weights": tensors(victim.parent / "model.safetensors"),
                "attack": tensors(victim.parent / "attack.safetensors"),
            }  # fmt: skip
            found.setdefault(f"{name}: victim {readable(victim)}", []).append(entry)
        for record in sorted(runs.glob("*/run.json")):
            found.setdefault(f"{name}: {readable(record)}", []).append(of_run(record))
    return {name: sorted(entries, key=json.dumps) for name, entries in found.items()}


def readable(path: Path) -> str:
    """The name of a file's folder without its hash, which may change; several folders can share it."""
    return re.sub(r"-[0-9a-f]{10}$", "", path.parent.name)


def of_run(path: Path) -> dict[str, Any]:
    """What a run found, without what depends on the clock, the machine and the folder."""
    record = json.loads(path.read_text())
    findings = record.get("findings", {})
    inner = findings.get("repair", findings)  # of defense=auto
    record["relaxed"] = record.get("relaxed", inner.pop("relaxed", 0.0))  # where it stood in records of schema 1
    record["history"] = [{OLD_KEYS.get(key, key): value for key, value in entry.items()} for entry in record.get("history", [])]
    keys = (
        "status",
        "metrics",
        "per_class",
        "history",
        "relaxed",
        "findings",
        "detection",
        "classes",
        "clean_set_size",
        "evaluated_on",
    )
    entries = {
        key: untimed(record[key]) for key in (*keys, "flagged", "training_counts", "needed_asr", "detector") if key in record
    }
    return entries | {name: tensors(path.parent / f"{name}.safetensors") for name in ("bounds", "arrays")}


def untimed(value: Any) -> Any:
    """The value without entries named as seconds."""
    if isinstance(value, dict):
        return {key: untimed(entry) for key, entry in value.items() if not UNTIMED.search(key)}
    return value


def tensors(path: Path) -> dict[str, str] | None:
    """The SHA-256 of the bytes of every tensor in a file; None where there is no such file."""
    if not path.exists():
        return None
    return {
        name: f"{tuple(value.shape)} {hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16]}"
        for name, value in sorted(load_file(path).items())
    }


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """The dotted paths of all entries that are not the same."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        return [found for key in keys for found in differences(before.get(key), after.get(key), f"{path}/{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [found for number, pair in pairs for found in differences(*pair, f"{path}/{number}")]
    return [] if before == after else [f"{path}: {str(before)[:80]} -> {str(after)[:80]}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("write", "check"))
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="do the runs here and leave them")
    options = parser.parse_args()
    work = options.keep or Path(tempfile.mkdtemp())
    try:
        found = json.loads(json.dumps(digests(work.absolute())))
    finally:
        if options.keep is None:
            shutil.rmtree(work)
    if options.mode == "write":
        options.file.write_text(json.dumps(found, indent=1))
        print(f"{len(found)} runs and victims written to {options.file}")
        return 0
    lines = differences(json.loads(options.file.read_text()), found)
    print("\n".join(lines) or f"all {len(found)} runs and victims are the same to the last bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
