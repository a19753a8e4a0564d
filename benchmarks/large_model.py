"""Time and memory of a repair of a large model: what is estimated before it starts, and what a few of its steps take.

    python benchmarks/large_model.py --steps 1 --batch-size 16 --max-inputs 8 --memory-gib 2

Weights and images are random: they change neither time nor memory. The full schedule is estimated for 1,000 classes of 2 images and for
10 classes of 50, with the two further repairs that the detector needs, and MM-BD beside it. Then ``--steps`` steps of one repair are
learned with the smaller batch that is given, and compared with the estimate of just those steps.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import time

import torch

from marginclip.defenses import MMAC, AscentPlan
from marginclip.defenses.clipping.passes import Passes, passes_of, passes_with_folds
from marginclip.maxmargin import MaximumMarginTest
from marginclip.networks.memory import memory_limited_to
from marginclip.service.estimate import duration, measure
from marginclip.silence import silence_lightning


def peak() -> float:
    """The most memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a classifier of torchvision")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--max-inputs", type=int, default=100)
    parser.add_argument("--memory-gib", type=float)
    given = parser.parse_args()
    silence_lightning()
    torch.manual_seed(0)
    models = importlib.import_module("torchvision.models")
    model = models.get_model(given.model, num_classes=1000).eval().to(memory_format=torch.channels_last)
    with memory_limited_to(given.memory_gib):
        speed = measure(model, torch.rand(8, 3, given.size, given.size))
        print(
            f"{given.model}, {given.size} px: {speed.forward:.3f} s an image, {speed.backward:.3f} s with its backward pass, "
            f"{speed.kept / 2**20:.0f} MiB kept for it, budget {speed.budget / 2**30:.1f} GiB",
            flush=True,
        )
        print("| classes x images | schedule | repair and detector | memory, GiB | MM-BD, at most |\n|---|---|---|---|---|")
        test = MaximumMarginTest()
        settings = {"batch_size": given.batch_size, "ascent": AscentPlan(max_inputs=given.max_inputs)}
        for classes, per_class in ((1000, 2), (10, 50)):
            searched = Passes(backward=classes * test.starts * (test.steps + 1))
            for name, defense in (("default", MMAC()), ("as given", MMAC(**settings))):
                passes = passes_with_folds(defense, classes * per_class, classes, 2)
                assert passes is not None
                print(
                    f"| {classes} x {per_class} | {name} | {duration(speed.seconds(passes))} | {speed.memory(passes) / 2**30:.1f} | "
                    f"{duration(speed.seconds(searched))} |",
                    flush=True,
                )
        images, before = torch.rand(2 * given.batch_size, 3, given.size, given.size), peak()
        labels = torch.cat([model(part).argmax(1) for part in images.split(8)])
        defense = MMAC(steps=given.steps, extra_steps=0, check_every=given.steps, **settings)
        passes = passes_of(defense, len(images), 1000)
        assert passes is not None
        started = time.perf_counter()
        defense.fit(model, images, labels)
        print(
            f"\n{given.steps} steps: {duration(time.perf_counter() - started)}, estimated {duration(speed.seconds(passes))}; "
            f"peak {peak():.1f} GiB, {before:.1f} before",
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
