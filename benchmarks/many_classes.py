"""What MMAC costs with 10, 100 and 1,000 classes, with and without a limit of its margin inputs (``max_inputs``).

    python benchmarks/many_classes.py

The data is made here: a smooth random image for each class, and noise. Each row is a process of its own: a small ResNet is trained
for a few epochs, repaired with ``--steps`` bound steps, and judged on images that neither saw: accuracy, and the mean margin that four
small steps reach towards 100 of the classes. Seconds are those of the repair, memory is the peak of the whole process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.defenses import MMAC, AscentPlan
from marginclip.maxmargin.margin import ascend_margins
from marginclip.models import ResNet
from marginclip.silence import silence_lightning, silent_trainer


def make_images(classes: int, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """``per_class`` noisy copies of each class's own smooth image: (N, 3, 32, 32) in [0, 1], and labels (N,)."""
    smooth = torch.rand(classes, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    prototypes = F.interpolate(smooth, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    labels = torch.arange(classes).repeat(per_class)
    noise = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return (0.2 + 0.6 * prototypes[labels] + 0.15 * noise).clamp(0, 1), labels


def train(classes: int, epochs: int) -> nn.Module:
    """A classifier of these classes."""
    torch.manual_seed(0)
    model = ResNet(classes, blocks=(1, 1, 1), width=16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = make_images(classes, max(4, 1000 // classes), seed=1)
    steps = epochs * -(-len(images) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(100):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def memory() -> float:
    """The peak of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    decisions = torch.cat([network(batch).argmax(1) for batch in images.split(250)])
    return float((decisions == labels).float().mean())


def reached(network: nn.Module, images: Tensor, labels: Tensor, classes: int) -> float:
    """The mean margin that four small steps reach towards 100 of the classes, from images of other classes."""
    wanted = torch.randperm(classes, generator=torch.Generator().manual_seed(3))[:100]
    rows = torch.stack([(labels != label).nonzero().flatten()[int(label) % 7] for label in wanted])
    return float(ascend_margins(network, wanted, images[rows], steps=4, step_size=0.005, rule="unit_rms").margins.mean())


def measure(classes: int, limit: int | None, steps: int, epochs: int) -> dict[str, float]:
    """One row."""
    silence_lightning()
    model = train(classes, epochs)
    images, labels = make_images(classes, max(2, min(50, 1000 // classes)), seed=2)
    fresh, fresh_labels = make_images(classes, max(2, 1000 // classes), seed=4)
    before = {"accuracy": accuracy(model, fresh, fresh_labels), "margin": reached(model, fresh, fresh_labels, classes)}
    defense = MMAC(steps=steps, extra_steps=0, ascent=AscentPlan(max_inputs=limit))
    started = time.perf_counter()
    network = defense.fit(model, images, labels, make_trainer=silent_trainer).network
    seconds = time.perf_counter() - started
    after = {"accuracy": accuracy(network, fresh, fresh_labels), "margin": reached(network, fresh, fresh_labels, classes)}
    return {"seconds": seconds, "memory": memory()} | {f"{key}_before": value for key, value in before.items()} | after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default="10,100,1000")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        classes, limit = given.row.split(",")
        print(json.dumps(measure(int(classes), None if limit == "none" else int(limit), given.steps, given.epochs)))
        return
    print(
        "| classes | margin inputs at most | s | peak MiB | ACC before, after % | mean margin before, after |\n|---|---|---|---|---|---|"
    )
    for classes in given.classes.split(","):
        for limit in ("100", "none"):
            words = ["--row", f"{classes},{limit}", "--steps", str(given.steps), "--epochs", str(given.epochs)]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {classes} | {limit} | {row['seconds']:.1f} | {row['memory']:.0f} | {100 * row['accuracy_before']:.1f}, "
                f"{100 * row['accuracy']:.1f} | {row['margin_before']:.1f}, {row['margin']:.1f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
