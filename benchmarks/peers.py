"""Every method on the same victims with the same clean images: the table, who differs by more than chance, and a picture for each method.

    python benchmarks/peers.py --runs-dir runs --points benchmarks/results/peers.json
    python benchmarks/peers.py --points benchmarks/results/peers.json --figures docs/figures

The first reads the runs of the commands in docs/results/methods.md below ``--runs-dir`` and writes their figures down; the second draws
what was written down. Both print the table. ACC and ASR are in percent; mean and sample deviation are over seeds. Two methods
are compared on all victims that both have, attack by attack and seed by seed, by the exact Wilcoxon signed-rank test.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

from marginclip.record import RunRecord
from marginclip.reporting.figures import save_png
from marginclip.reporting.style import AFTER, BEFORE, NEUTRAL, new_figure, tidy
from marginclip.reporting.summary import load_records

DATASET, X2X = "mnist_m", "all2one"
CLEAN_SET = 500  # images, 50 of every class: those of runs with more or fewer are not compared
ATTACKS = ("badnet", "chessboard", "wanet")
SEEDS = ("0", "1", "2")
MEASURES = ("acc", "asr", "pacc", "seconds")
COMPARED_WITH = "mmac"


@dataclass(frozen=True)
class Method:
    """A line of the table: the defense whose runs have it, their row, and the settings that they must have."""

    title: str
    defense: str
    row: str
    settings: Mapping[str, float | None] = field(default_factory=dict)


DEFAULT = {"defense.detector.folds": 2, "defense.start.share": None, "defense.start.kept": None, "defense.repeats": 1}
METHODS = {
    "none": Method("no defense", "mmdf", "none", DEFAULT),
    "static_clip_0.9": Method(
        "bounds set, 0.9 quantile", "static_clip", "static_clip", {"defense.start.quantile": 0.9, "defense.start.share": 0.5}
    ),
    "static_clip_1.0": Method(
        "bounds set, maximum", "static_clip", "static_clip", {"defense.start.quantile": 1.0, "defense.start.share": 0.5}
    ),
    "finetune": Method("fine-tuning", "finetune", "finetune"),
    "fine_pruning": Method("Fine-Pruning", "fine_pruning", "fine_pruning"),
    "neural_cleanse": Method("Neural Cleanse, target given", "neural_cleanse", "neural_cleanse", {"defense.epochs": 1}),
    "neural_cleanse_10": Method(
        "Neural Cleanse, target given, 10 passes", "neural_cleanse", "neural_cleanse", {"defense.epochs": 10}
    ),
    "nad": Method("NAD", "nad", "nad"),
    "ibau": Method("I-BAU", "ibau", "ibau", {"defense.learning_rate": 3e-4, "defense.rounds": 5}),
    "ibau_slow": Method("I-BAU, rate 1e-4, 20 rounds", "ibau", "ibau", {"defense.learning_rate": 1e-4, "defense.rounds": 20}),
    "anp": Method("ANP", "anp", "anp"),
    "ft_sam": Method("FT-SAM", "ft_sam", "ft_sam"),
    "mmbm": Method("MMBM", "mmbm", "mmbm"),
    "mmac": Method("MMAC", "mmdf", "mmac", DEFAULT),
    "mmdf": Method("MMDF", "mmdf", "mmdf", DEFAULT),
    "mmdf_both": Method("MMDF, both statistics", "mmdf", "mmdf_both", DEFAULT),
    "mmdf_repaired": Method("MMDF, repair decides", "mmdf", "mmdf_repaired", DEFAULT),
    "mmac_finetune": Method(
        "MMAC, then fine-tuning",
        "mmac_finetune",
        "mmac_finetune",
        {"defense.mixture_weight": 1, "defense.mmac.start.share": None},
    ),
}
Points = dict[str, dict[str, dict[str, dict[str, float]]]]  # method -> attack -> seed -> measure -> value


def measured(records: Iterable[RunRecord]) -> Points:
    """What the finished runs say of ``METHODS`` against ``ATTACKS``, all2one; two runs of one victim with other results are an error."""
    found: Points = {}
    for record in records:
        attack, seed = str(record.choice("attack")), str(record.seed)
        known = attack in ATTACKS and seed in SEEDS and (record.choice("dataset"), record.choice("x2x")) == (DATASET, X2X)
        if record.status != "done" or not known or record.clean_set_size not in (None, CLEAN_SET):
            continue
        for name, method in METHODS.items():
            wanted = all(record.setting(key) == value for key, value in method.settings.items())
            if record.choice("defense") != method.defense or method.row not in record.metrics or not wanted:
                continue
            seeds = found.setdefault(name, {}).setdefault(attack, {})
            phases = record.rows[method.row].phases
            values = {measure: 100 * record.metrics[method.row][measure] for measure in MEASURES if measure != "seconds"}
            if any(values[measure] != seeds.get(seed, values)[measure] for measure in values):
                raise SystemExit(f"two runs have {method.title} on {attack}, seed {seed}: give a folder of one of them")
            seeds[seed] = values | {"seconds": sum(record.seconds.get(phase, 0.0) for phase in phases)}
    return found


def victims(points: Points, name: str, measure: str) -> dict[tuple[str, str], float]:
    """(attack, seed) -> value."""
    seeds = points.get(name, {})
    return {(attack, seed): values[measure] for attack in seeds for seed, values in seeds[attack].items()}


def spread(values: list[float]) -> str:
    """Mean and sample deviation, or the one value."""
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def against(points: Points, name: str, measure: str) -> str:
    """The mean difference of ``name`` from MMAC over the victims of both, and the p-value of the signed-rank test."""
    own, other = (victims(points, each, measure) for each in (name, COMPARED_WITH))
    both = sorted(own.keys() & other.keys())
    if name in ("none", COMPARED_WITH) or len(both) < 6:  # with fewer the exact test cannot fall below 0.05
        return ""
    differences = np.array([own[each] - other[each] for each in both])
    p = wilcoxon(differences, method="exact").pvalue if np.any(differences) else 1.0
    return f"{differences.mean():+.1f} (p = {p:.3f})"


def table(points: Points) -> str:
    """The table as Markdown."""
    head = ["method", *(f"{attack}, ACC / ASR / PACC" for attack in ATTACKS), "ACC - MMAC's", "ASR - MMAC's", "s"]
    lines = [head, ["---"] * len(head)]
    for name, method in METHODS.items():
        if name not in points:
            continue
        cells = []
        for attack in ATTACKS:
            seeds = points[name].get(attack, {})
            cells.append(
                " / ".join(spread([each[measure] for each in seeds.values()]) for measure in MEASURES[:3]) if seeds else ""
            )
        seconds = list(victims(points, name, "seconds").values())
        lines.append(
            [method.title, *cells, against(points, name, "acc"), against(points, name, "asr"), f"{np.mean(seconds):.0f}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(points: Points, name: str) -> Figure:
    """For each attack every victim as it was and after the method, and where the other methods took it."""
    figure = new_figure(7.6, 2.7, "")
    for place, attack in enumerate(ATTACKS):
        axes = figure.add_subplot(1, len(ATTACKS), place + 1)
        before, after = (points[each].get(attack, {}) for each in ("none", name))
        others = [
            values
            for other in METHODS
            if other not in ("none", name)
            for values in points.get(other, {}).get(attack, {}).values()
        ]
        axes.plot(
            [each["asr"] for each in others], [each["acc"] for each in others], ".", color=NEUTRAL, alpha=0.35, markersize=5
        )
        for seed, values in after.items():
            start, end = (before[seed]["asr"], before[seed]["acc"]), (values["asr"], values["acc"])
            axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": AFTER, "alpha": 0.6})
            axes.plot(*start, "s", color=BEFORE, markersize=5, label="no defense")
            axes.plot(*end, "o", color=AFTER, markersize=6, label=METHODS[name].title)
        axes.set_xlim(-5, 105)
        tidy(axes, title=attack, xlabel="ASR, %", ylabel="ACC, %" if place == 0 else "")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    handles["other methods"] = axes.plot([], [], ".", color=NEUTRAL, alpha=0.5)[0]
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Read or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, help="folder of the runs; without it --points is read")
    parser.add_argument("--points", type=Path, default=Path("benchmarks/results/peers.json"))
    parser.add_argument("--figures", type=Path, help="folder for method_<name>.png")
    options = parser.parse_args()
    if options.runs_dir is not None:
        rounded = json.loads(
            json.dumps(measured(load_records(options.runs_dir))), parse_float=lambda text: round(float(text), 2)
        )
        options.points.write_text(json.dumps(rounded, indent=1, sort_keys=True) + "\n")
    points = json.loads(options.points.read_text())
    print(table(points))
    if options.figures is not None:
        for name in ("finetune", "fine_pruning", "nad", "ibau", "anp", "mmbm", "mmac_finetune"):
            save_png(picture(points, name), options.figures / f"method_{name}.png")


if __name__ == "__main__":
    main()
