"""Draw the pictures of the pages about attacks and losses, from images and formulas alone; no model is trained.

    python benchmarks/method_pictures.py [--output docs/figures]

The images are MNIST-M digits, which ship with two packages. An attack's picture is ``attack_<name>.png``, a loss's ``loss_<name>.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from marginclip.attacks import AllToOne, Attack, BadNet, Blend, BlendFull, Chessboard, LowFrequency, OnePixel, Sinusoid, WaNet
from marginclip.data import MnistM
from marginclip.losses.gcl import tail_ranks
from marginclip.losses.ldam import effective_weights, ldam_margins
from marginclip.reporting.examples import amplification
from marginclip.reporting.figures import save_png
from marginclip.reporting.style import AFTER, BEFORE, new_figure, tidy

ATTACKS: dict[str, type[Attack]] = {
    "badnet": BadNet,
    "blend": Blend,
    "chessboard": Chessboard,
    "wanet": WaNet,
    "sinusoid": Sinusoid,
    "blend_full": BlendFull,
    "low_frequency": LowFrequency,
    "one_pixel": OnePixel,
}
COUNTS = (5000 * 100.0 ** (-torch.arange(10) / 9)).floor()  # the class sizes of LT-100


def digits() -> Tensor:
    """A 4 and a 7 of the training images in [0, 1], (2, 3, 28, 28)."""
    train = MnistM().load().train
    places = [int((train.labels == digit).nonzero()[0]) for digit in (4, 7)]
    return train.images[places].float() / 255


def attack_picture(name: str, attack: Attack, images: Tensor) -> Figure:
    """Each image as it is, with the trigger, and the difference between the two."""
    with torch.no_grad():
        triggered = attack(images)
    difference = (triggered - images).abs()
    factor = amplification(float(difference.max()))
    figure = new_figure(7.2, 1.75, name)
    columns = [part[place] for place in range(len(images)) for part in (images, triggered, (difference * factor).clamp(0, 1))]
    titles = ("clean", "triggered", f"|difference| x {factor:g}")
    for place, image in enumerate(columns):
        axes = figure.add_subplot(1, len(columns), place + 1)
        show(axes, image, titles[place % 3])
    return figure


def show(axes, image: Tensor, title: str) -> None:
    """One image (C, H, W) without axes."""
    axes.imshow(np.moveaxis(image.numpy(), 0, -1), vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def mixup_picture(images: Tensor) -> Figure:
    """Two images and their mixture."""
    figure = new_figure(4.2, 1.9, "mixup, share 0.6")
    for place, (image, title) in enumerate(
        [(images[0], "x"), (images[1], "x'"), (0.6 * images[0] + 0.4 * images[1], "0.6 x + 0.4 x'")]
    ):
        show(figure.add_subplot(1, 3, place + 1), image, title)
    return figure


def ldam_picture() -> Figure:
    """The margin of every class, and the weight that it has at the end."""
    figure = new_figure(7.2, 2.8, "LDAM on LT-100")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    left.plot(COUNTS, ldam_margins(COUNTS, largest=0.5), "o-", color=AFTER)
    right.plot(COUNTS, effective_weights(COUNTS, beta=0.9999), "o-", color=BEFORE)
    tidy(left, title="margin", xlabel="training images of the class", ylabel="m_j, in cosines")
    tidy(right, title="weight from reweight_from on", xlabel="training images of the class", ylabel="weight, 1 on average")
    for axes in (left, right):
        axes.set_xscale("log")
    return figure


def gcl_picture() -> Figure:
    """By how much the noise of the first stage lowers the logits of every class, on average."""
    figure = new_figure(4.4, 2.8, "GCL on LT-100, first stage")
    axes = figure.add_subplot()
    mean_noise = (2 / np.pi) ** 0.5 / 3  # of |N(0, 1/9)|
    axes.plot(COUNTS, 30 * 0.5 * mean_noise * tail_ranks(COUNTS), "o-", color=AFTER)
    axes.set_xscale("log")
    tidy(axes, title="", xlabel="training images of the class", ylabel="logits are lowered by")
    return figure


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    folder = parser.parse_args().output
    images = digits()
    for name, attack in ATTACKS.items():
        made = attack(AllToOne(10, target=0), tuple(images.shape[1:]))
        save_png(attack_picture(name, made, images), folder / f"attack_{name}.png")
    save_png(mixup_picture(images), folder / "loss_mixup.png")
    save_png(ldam_picture(), folder / "loss_ldam.png")
    save_png(gcl_picture(), folder / "loss_gcl.png")


if __name__ == "__main__":
    main()
