"""How often an audit is right: audits victims of this project whose fault is known, and prints a row for each and a confusion table.

    python benchmarks/verdicts.py --runs-dir runs [--reach]

``--reach`` takes only the two tests that can accuse, small steps and a warp: seconds a victim. Victims that are not in the store are
trained first: a minute or two each on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from marginclip.experiment.command import plain
from marginclip.experiment.process import prepare_process
from marginclip.experiment.setup import VictimSetup, build_setup
from marginclip.experiment.spec import RunSpec, run_spec
from marginclip.experiment.stages import load_model
from marginclip.experiment.trainers import build_trainer
from marginclip.files import write_whole
from marginclip.service import audit
from marginclip.service.reach import reach, warp_reach
from marginclip.silence import SILENT, silence_lightning

CONF = Path(__file__).parents[1] / "conf"
# Options of the victim, and what an audit should say of it.
VICTIMS = [
    *((f"attack=none seed={seed}", "nothing") for seed in range(10)),
    *((f"attack=badnet seed={seed}", "poisoned") for seed in range(3)),
    ("attack=chessboard seed=0", "poisoned"),
    ("attack=sinusoid seed=0", "poisoned"),
    ("attack=blend_full seed=0", "poisoned"),
    ("attack=low_frequency attack.amplitude=0.12 seed=0", "poisoned"),
    ("attack=one_pixel seed=0", "poisoned"),
    ("attack=wanet training.epochs=50 seed=0", "poisoned"),
    ("attack=wanet training.epochs=50 seed=1", "poisoned"),
    ("attack=none imbalance=exponential imbalance.ratio=20 seed=0", "imbalanced"),
    ("attack=none imbalance=step imbalance.ratio=20 seed=0", "imbalanced"),
    # BadNet does not take in so few images of the rare classes: only the imbalance is there to be found.
    *((f"attack=badnet imbalance=exponential imbalance.ratio=10 seed={seed}", "imbalanced") for seed in (0, 1)),
    *((f"attack=badnet attack.rate=0.3 imbalance=exponential imbalance.ratio=5 seed={seed}", "both") for seed in (0, 1)),
]


def specified(options: str, runs_dir: str) -> RunSpec:
    """The specification of a run with these options."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "defend", [*options.split(), f"runs_dir={runs_dir}", "logger=none", "trainer.enable_progress_bar=false"]
        )
    return run_spec(plain(config))


def obtained(options: str, runs_dir: str, *, clean_per_class: int = 50) -> tuple[VictimSetup, RunSpec]:
    """The victim with these options, found or trained, and the specification of its run."""
    spec = specified(options, runs_dir)
    prepare_process(spec.trainer.threads)
    setup = build_setup(spec, clean_per_class=clean_per_class)
    load_model(spec, setup)
    return setup, spec


def audited(options: str, runs_dir: str) -> dict[str, Any]:
    """The audit of one victim, with its true target class."""
    setup, spec = obtained(options, runs_dir)
    found = audit(
        setup.model, *setup.data.clean_set(), seed=spec.seed,
        make_trainer=lambda epochs: build_trainer(spec.trainer, max_epochs=epochs, **SILENT),
    )  # fmt: skip
    return {"true_target": setup.target_class, **found.to_dict()}


def row(options: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    reached, warped, margins = found["reach"], found["reach_by_warping"], found["maximum_margins"]
    target = "" if found["true_target"] is None else f", {found['true_target']}"
    return (
        f"| {options} | {found['verdict']['kind']} | {reached['suspect']}{target} | {reached['p_value']:.2g} | "
        f"{warped['suspect']}: {warped['p_value']:.2g} | {margins['suspect']}: "
        f"{margins['p_value']:.2g}, {margins['published_p_value']:.2g} | {sum(found['seconds'].values()):.0f} |"
    )


def reached_row(options: str, runs_dir: str) -> str:
    """A line of the table of ``--reach``."""
    setup, spec = obtained(options, runs_dir)
    started = time.perf_counter()
    steps, warps = (test(setup.model, *setup.data.clean_set(), seed=spec.seed) for test in (reach, warp_reach))
    target = "none" if setup.target_class is None else setup.target_class
    cells = (
        f"{found.suspect}: {found.p_value:.2g} ({ordered[0]:.1f}, {ordered[1]:.1f})"
        for found in (steps, warps)
        for ordered in [found.statistics.sort(descending=True).values.tolist()]
    )
    return f"| {options} | {target} | {' | '.join(cells)} | {time.perf_counter() - started:.0f} |"


def save(audits: dict[str, Any], output: Path) -> None:
    def write(partial: Path) -> None:
        partial.write_text(json.dumps(audits))

    write_whole(output, write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--only", default="", help="audit only victims whose options contain this")
    parser.add_argument("--reach", action="store_true", help="only the tests of reach")
    parser.add_argument("--output", default="verdicts.json", help="the whole of every audit; what is there is not done again")
    given = parser.parse_args()
    silence_lightning()
    if given.reach:
        print("| victim | true target | by steps: class, p (its logits, the next) | by a warp | s |\n|---|---|---|---|---|")
        for options, _ in VICTIMS:
            if given.only in options:
                print(reached_row(options, given.runs_dir), flush=True)
        return
    output = Path(given.output)
    audits = json.loads(output.read_text()) if output.exists() else {}
    counts: Counter[tuple[str, str]] = Counter()
    print(
        "| victim | verdict | class, true target | p by steps | by a warp | MM-BD: p, published | s |\n|---|---|---|---|---|---|---|"
    )
    for options, wanted in VICTIMS:
        if given.only not in options:
            continue
        if options not in audits:
            audits[options] = audited(options, given.runs_dir)
            save(audits, output)
        counts[wanted, audits[options]["verdict"]["kind"]] += 1
        print(row(options, audits[options]), flush=True)
    kinds = ("nothing", "poisoned", "imbalanced")
    print(f"\n| the victim is | {' | '.join(f'said: {kind}' for kind in kinds)} |\n|---|{'---|' * len(kinds)}")
    for wanted in dict.fromkeys(wanted for _, wanted in VICTIMS):
        print(f"| {wanted} | {' | '.join(str(counts[wanted, kind]) for kind in kinds)} |")


if __name__ == "__main__":
    main()
