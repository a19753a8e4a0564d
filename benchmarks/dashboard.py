"""How large the dashboard of many runs is, and how fast it opens.

    python benchmarks/dashboard.py                       500 made-up records; needs no Chromium for the sizes
    python benchmarks/dashboard.py --runs 50 --keep DIR  leave records and pages in DIR

The records are made up: no figure in them was measured. The times are those from asking Chromium for a page to its being ready and
drawn, the median of ``--rounds`` fresh pages, without network.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from marginclip.record import Device, Row, RunRecord, VictimSource
from marginclip.reporting.dashboard import write_dashboard

ATTACKS = (
    "badnet",
    "blend",
    "chessboard",
    "wanet",
    "input_aware",
    "clean_label",
    "sinusoid",
    "one_pixel",
    "low_frequency",
    "none",
)
DEFENSES = {"mmdf": "MMDF", "static_clip": "static clip", "finetune": "fine-tuning", "nad": "NAD", "ibau": "I-BAU"}
STAGES = 17
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_runs(folder: Path, count: int, *, images: int = 400) -> list[Path]:
    """Made-up records and arrays of ``count`` runs, attacks by defenses by seeds, with ``images`` scores of each kind; their folders."""
    cells = itertools.product(range(count), ATTACKS, DEFENSES)
    return [_write_run(folder, attack, defense, seed, images) for seed, attack, defense in itertools.islice(cells, count)]


def _write_run(folder: Path, attack: str, defense: str, seed: int, images: int) -> Path:
    generator = np.random.default_rng([seed, ATTACKS.index(attack), list(DEFENSES).index(defense)])
    place = folder / f"cifar10-resnet18-{attack}-{defense}-seed{seed}"
    place.mkdir(parents=True)
    arrays = _arrays(generator, defense, images, attacked=attack != "none")
    threshold = float(np.quantile(arrays[f"scores/{defense}_clean"], 0.995))
    record = RunRecord(
        status="attack_failed" if attack == "low_frequency" and seed % 3 == 0 else "done",
        config=_config(attack, defense, seed),
        identity=_config(attack, defense, seed),
        seed=seed,
        versions={"python": "3.11.7", "marginclip": "0.1.0", "torch": "2.6.0", "lightning": "2.6.0"},
        device=Device(name="made up", accelerator="cpu", threads=1),
        precision="32-true",
        seconds={"victim": 0.1, "repair": float(generator.uniform(5, 60)), "detector": 20.0, "evaluation": 3.0},
        victim=VictimSource(folder=f"victims/cifar10-resnet18-{attack}-seed{seed}", trained_now=False),
        detector={"threshold": threshold, "theta": 0.005},
        rows={"none": Row(label="no defense"), defense: Row(label=DEFENSES[defense], phases=["repair", "detector"])},
        repaired_row=defense,
        metrics={"none": _metrics(generator, arrays, None, None), defense: _metrics(generator, arrays, defense, threshold)},
        per_class={row: generator.uniform(0.7, 1, 10).round(4).tolist() for row in ("none", defense)},
        classes=list(CLASSES),
        clean_set_size=500,
        evaluated_on="held_out",
        needed_asr=0.9,
        history=[_check(generator) for _ in range(12)] if defense == "mmdf" else [],
    )
    record.at(place).write()
    save_file({name: torch.from_numpy(values) for name, values in arrays.items()}, place / "arrays.safetensors")
    return place


def _arrays(generator: np.random.Generator, row: str, images: int, *, attacked: bool) -> dict[str, np.ndarray]:
    kinds = {"clean": 1.0, "triggered": 9.0} if attacked else {"clean": 1.0}
    arrays = {f"scores/{row}_{kind}": generator.normal(mean, 2, images).astype(np.float32) for kind, mean in kinds.items()}
    likely = {"clean_correct": (0.95, 0.1), "triggered_success": (0.95, 0.02), "triggered_restored": (0.03, 0.9)}
    for outcome, (below, above) in likely.items():
        if outcome.partition("_")[0] in kinds:
            codes = (generator.random(images) < below) + 2 * (generator.random(images) < above)
            arrays[f"outcomes/{row}/{outcome}"] = codes.astype(np.uint8)
    for stage, kind in itertools.product(range(STAGES), ("clean_max", "triggered_max", "upper")):
        arrays[f"activations/{stage:03d}_layer{stage}_act/{kind}"] = generator.uniform(1, 6, 16).astype(np.float32)
    return arrays


def _metrics(
    generator: np.random.Generator, arrays: dict[str, np.ndarray], row: str | None, threshold: float | None
) -> dict[str, float | None]:
    """Those of a detector agree with its arrays."""
    attacked = any(name.endswith("_triggered") for name in arrays)
    if row is None or threshold is None:
        return {"acc": float(generator.uniform(0.9, 0.93))} | ({"asr": 0.99, "pacc": 0.01} if attacked else {})
    found: dict[str, float | None] = {"fpr": float(np.mean(arrays[f"scores/{row}_clean"].astype(float) >= threshold))}
    named = {"acc": "clean_correct", "asr": "triggered_success", "pacc": "triggered_restored"}
    for metric, outcome in named.items():
        if f"outcomes/{row}/{outcome}" in arrays:
            codes, above = (
                arrays[f"outcomes/{row}/{outcome}"],
                arrays[f"scores/{row}_{outcome.partition('_')[0]}"].astype(float) >= threshold,
            )
            found[metric] = float(np.where(above, codes // 2, codes % 2).mean())
    if attacked:
        found["tpr"] = float(np.mean(arrays[f"scores/{row}_triggered"].astype(float) >= threshold))
    return found


def _config(attack: str, defense: str, seed: int) -> dict[str, Any]:
    """About as many settings as a real run has."""
    return {
        "seed": seed,
        "clean_per_class": "auto",
        "dataset": {"name": "cifar10", "_target_": "marginclip.data.Cifar10", "root": "data"},
        "attack": {"name": attack, "rate": 0.1, "timing": "before_augmentation", "min_success": 0.9},
        "x2x": {"name": "all2one", "target": None},
        "model": {"name": "resnet18", "width": 64, "blocks": [2, 2, 2, 2], "activation": "relu"},
        "training": {"epochs": 100, "batch_size": 128, "optimizer": {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.0005}},
        "defense": {"name": defense} | {f"setting_{number}": number / 7 for number in range(45)},
        "trainer": {"accelerator": "auto", "devices": 1, "precision": "auto", "threads": 1},
        "logger": {"kind": "none"},
    }


def _check(generator: np.random.Generator) -> dict[str, float]:
    keys = ("agreement", "data", "mean_margin", "max_margin", "lambda", "active_bounds")
    return {key: float(generator.uniform(0.1, 1)) for key in keys}


# -- measuring ----------------------------------------------------------------------------------------------------------------


def size_mb(path: Path) -> float:
    """The size of a file, or of all files of a folder, in MB of 1,000,000 bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def opening_seconds(addresses: dict[str, str], rounds: int) -> dict[str, float]:
    """For each name the median seconds until Chromium has its page ready and drawn."""
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = {name: [] for name in addresses}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _, (name, address) in itertools.product(range(rounds), addresses.items()):
            context = browser.new_context(offline=True)
            page = context.new_page()
            page.goto("about:blank")
            started = time.perf_counter()
            page.goto(address)
            page.wait_for_selector("html[data-ready=yes]")
            page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
            found[name].append(time.perf_counter() - started)
            context.close()
        browser.close()
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Print sizes, and times where there is Chromium."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="write into this folder, and leave it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        write_runs(folder / "runs", options.runs)
        started = time.perf_counter()
        index = write_dashboard(folder / "runs", folder / "site")
        print(f"{options.runs} runs: written in {time.perf_counter() - started:.1f} s")
        single = write_dashboard(folder / "runs", folder / "one.html")
        print(f"folder {size_mb(index.parent):.1f} MB, one file {size_mb(single):.1f} MB")
        if shutil.which("chromium") is None:
            print("no Chromium here: the times are not measured")
            return
        run = next((index.parent / "run").glob("*mmdf-seed0.html"))
        pages = {page: (index.parent / f"{page}.html").as_uri() for page in ("index", "pivot", "runs", "compare", "victims")}
        pages |= {"run": run.as_uri(), "one file": single.as_uri(), "one file, pivot": f"{single.as_uri()}#pivot"}
        for name, seconds in opening_seconds(pages, options.rounds).items():
            print(f"{name}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
