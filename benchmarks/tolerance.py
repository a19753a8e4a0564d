"""What it costs to hold a tolerance: accuracy and success of the attack where bounds are relaxed to lose fewer points out of fold.

    python benchmarks/tolerance.py --runs-dir runs

Each victim is repaired once, with two repairs that each leave half of its 50 clean images a class out; each row relaxes those bounds anew.
Victims that are not in the store are trained first.
"""

from __future__ import annotations

import argparse

from clean_sets import Judge
from verdicts import obtained

from marginclip.defenses import MMAC
from marginclip.defenses.clipping.tolerance import hold
from marginclip.defenses.cross_fitting import cross_fitted
from marginclip.maxmargin import MarginDropDetector
from marginclip.networks.logits import clean_logits
from marginclip.silence import silence_lightning

VICTIMS = (
    "attack=badnet",
    "attack=wanet training.epochs=50",
    "attack=sinusoid",
    "attack=badnet model=resnet20",
    "attack=badnet model=resnet20 model.blocks=[9,9,9]",  # a ResNet-56: deep and narrow
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--only", default="", help="victims whose options contain this")
    parser.add_argument("--tolerances", default="100,2,1,0.5,0")
    given = parser.parse_args()
    silence_lightning()
    print(
        "| victim | tolerance | relaxed | lost out of fold | no defense | MMAC | MMDF | MMDF, repair decides | false alarms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for options in VICTIMS:
        if given.only not in options:
            continue
        setup, _ = obtained(options, given.runs_dir)
        model, (images, labels), judge, defense = setup.model, setup.data.clean_set(), Judge(setup), MMAC()
        logits = clean_logits(model, images)
        network = defense.fit(model, images, labels).network
        fitted = cross_fitted(defense, model, images, labels)
        networks = [network, *fitted.networks]
        learned = [each.bounds_state() for each in networks]  # type: ignore[operator]
        for tolerance in map(float, given.tolerances.split(",")):
            for each, bounds in zip(networks, learned, strict=True):
                each.load_bounds(bounds)  # type: ignore[operator]
            cost = hold(network, fitted, images, labels, logits, tolerance=tolerance)
            detector = MarginDropDetector.from_logits(model, network, logits, cost.logits)
            print(
                f"| {options} | {tolerance:g} | {100 * cost.relaxed:.0f} % | {cost.points:.1f} | {' | '.join(judge.rows(detector))} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
