"""Seconds, memory and quality of MMAC: ours against the published schedule, same victim, same machine, one run.

    python benchmarks/repair.py                      the embedded default's victim
    python benchmarks/repair.py experiment=cifar10_folder_small attack=badnet

Each side runs in a process of its own, ours first; the victim is found in the store, or trained before. Prints a table with the
ratio of the seconds and writes ``benchmarks/results/repair-<victim>.json``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("ours", "published")


def one_side(side: str, overrides: list[str]) -> dict[str, Any]:
    """Repair the victim and measure the repair alone."""
    from marginclip.evaluation import Evaluation
    from marginclip.experiment.command import plain
    from marginclip.experiment.process import prepare_process
    from marginclip.experiment.setup import build_setup
    from marginclip.experiment.spec import run_spec
    from marginclip.experiment.trainers import build_trainer
    from marginclip.experiment.victim import obtain_victim
    from marginclip.silence import SILENT

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        spec = run_spec(plain(compose("defend", overrides=["defense=mmac", "logger=none", *overrides])))
    prepare_process(spec.trainer.threads)
    assert spec.defense is not None
    defense = spec.defense.choice.make(seed=spec.seed)
    setup = build_setup(spec, clean_per_class=defense.clean_per_class)
    victim, _ = obtain_victim(spec, setup)
    model, (images, labels) = setup.model.eval(), setup.data.clean_set()
    started = time.perf_counter()
    if side == "ours":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        make_trainer = partial(build_trainer, spec.trainer, **SILENT)
        repaired = defense.fit(model, images, labels, make_trainer=lambda epochs: make_trainer(max_epochs=epochs)).network
    else:
        from published import published_mmac

        torch.manual_seed(spec.seed)
        repaired = published_mmac(model, images, labels)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    evaluation = Evaluation({"none": model, "repaired": repaired})
    build_trainer(spec.trainer, **SILENT).test(evaluation, setup.data, verbose=False)
    results = evaluation.results()
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "victim": victim.folder.name,
        "none": results["none"],
        "repaired": results["repaired"],
    }


def main() -> None:
    """Run both sides and print the table."""
    if len(sys.argv) > 1 and sys.argv[1] in SIDES:
        sys.stdout.write("\n" + json.dumps(one_side(sys.argv[1], sys.argv[2:])))
        return
    rows = {}
    for side in SIDES:
        done = subprocess.run([sys.executable, __file__, side, *sys.argv[1:]], capture_output=True, text=True, cwd=Path.cwd())
        if done.returncode:
            sys.exit(f"the side '{side}' failed:\n{done.stderr[-3000:]}")
        rows[side] = json.loads(done.stdout.splitlines()[-1])
    ratio = rows["published"]["seconds"] / rows["ours"]["seconds"]
    print("| side | seconds | peak memory (MiB) | ACC | ASR | PACC |\n|---|---|---|---|---|---|")
    for side, row in {"no defense": rows["ours"] | {"repaired": rows["ours"]["none"], "seconds": 0}, **rows}.items():
        metrics = " | ".join(f"{100 * row['repaired'].get(name, float('nan')):.1f}" for name in ("acc", "asr", "pacc"))
        print(f"| {side} | {row['seconds']:.1f} | {row['peak_mib']:.0f} | {metrics} |")
    print(f"\nours is {ratio:.1f} times faster ({rows['ours']['victim']}, {torch.get_num_threads()} threads)")
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"repair-{rows['ours']['victim']}.json").write_text(json.dumps(rows | {"ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
