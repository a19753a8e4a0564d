"""Draw the pictures of the pages about attacks, losses and methods, from images, formulas and a linear layer of two features.

    python benchmarks/method_pictures.py [--output docs/figures]

The images are MNIST-M digits, which ship with two packages. An attack's picture is ``attack_<name>.png``, a loss's
``loss_<name>.png``, a method's ``method_<name>.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn

from marginclip.attacks import AllToOne, Attack, BadNet, Blend, BlendFull, Chessboard, LowFrequency, OnePixel, Sinusoid, WaNet
from marginclip.data import MnistM
from marginclip.defenses import Defense, LastLayer, LogitAdjustment, LogitCalibration, TauNormalisation
from marginclip.losses.gcl import tail_ranks
from marginclip.losses.ldam import effective_weights, ldam_margins
from marginclip.reporting.examples import amplification
from marginclip.reporting.figures import save_png
from marginclip.reporting.style import AFTER, BEFORE, NEUTRAL, new_figure, tidy

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
OF_THE_LAST_LAYER: dict[str, Defense] = {
    "bias_only": LogitCalibration(scale="none", shift=True),
    "temperature_scaling": LogitCalibration(scale="shared", shift=False),
    "bias_corrected_temperature": LogitCalibration(scale="shared", shift=True),
    "vector_scaling": LogitCalibration(scale="per_class", shift=True),
    "lws": LogitCalibration(scale="per_class", shift=False),
    "logit_adjustment": LogitAdjustment(),
    "tau_normalisation": TauNormalisation(),
    "last_layer": LastLayer(),
}
CENTRES = torch.tensor([[0.45, 0.65], [0.35, 0.40], [0.65, 0.45]])  # of three classes of features in [0, 1]
SPREAD, TRAINING_SIZES = 0.09, (1000, 100, 10)
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


def cross_entropy_picture() -> Figure:
    """The loss and its gradient over the margin of the true class, with label smoothing and without, of ten classes."""
    figure = new_figure(7.2, 2.8, "Cross entropy of ten classes, nine of equal logit")
    lost, slope = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for smoothing, colour in ((0.0, BEFORE), (0.1, AFTER)):
        own = torch.linspace(-6, 12, 200, requires_grad=True)
        logits = torch.cat([own[:, None], torch.zeros(200, 9)], 1)
        losses = nn.functional.cross_entropy(
            logits, torch.zeros(200, dtype=torch.long), reduction="none", label_smoothing=smoothing
        )
        (gradient,) = torch.autograd.grad(losses.sum(), own)
        for axes, values in ((lost, losses), (slope, gradient)):
            axes.plot(own.detach(), values.detach(), color=colour, label=f"label smoothing {smoothing:g}")
    lost.legend(frameon=False, fontsize=9)
    tidy(lost, title="loss", xlabel="margin of the true class, logits", ylabel="nats")
    tidy(slope, title="its derivative by the margin", xlabel="margin of the true class, logits", ylabel="")
    return figure


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


def clip_picture() -> Figure:
    """What a bound does to an activation."""
    figure = new_figure(4.4, 2.8, "A bound on a ReLU")
    axes = figure.add_subplot()
    given = np.linspace(-2, 6, 200)
    axes.plot(given, given.clip(0), "--", color=BEFORE, label="ReLU")
    axes.plot(given, given.clip(0, 3), color=AFTER, label="with the bound z = 3")
    axes.legend(frameon=False)
    tidy(axes, title="", xlabel="input", ylabel="activation")
    return figure


def inversion_picture(image: Tensor) -> Figure:
    """The parts of an inverted trigger: the image, the mask, the pattern, and what they make."""
    mask, pattern = torch.zeros_like(image), torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    mask[:, 20:24, 19:23] = 0.9
    parts = {"x": image, "mask m": mask, "pattern p": pattern, "(1 - m) x + m p": (1 - mask) * image + mask * pattern}
    figure = new_figure(5.4, 1.9, "The trigger that Neural Cleanse looks for")
    for place, (title, part) in enumerate(parts.items()):
        show(figure.add_subplot(1, len(parts), place + 1), part, title)
    return figure


def sharpness_picture() -> Figure:
    """Where FT-SAM takes its gradient: at the worst point near the weights, where a sharp minimum shows."""
    figure = new_figure(5.4, 2.8, "A sharp and a flat minimum")
    axes = figure.add_subplot()
    weights = np.linspace(-3, 4, 400)
    loss = 1 - np.exp(-((weights + 1) ** 2) / 0.08) - 0.9 * np.exp(-((weights - 2) ** 2) / 1.5)
    axes.plot(weights, loss, color=AFTER)
    for start, color in ((-1.0, BEFORE), (2.0, AFTER)):
        at = [float(np.interp(place, weights, loss)) for place in (start, start + 0.5)]
        axes.annotate("", xy=(start + 0.5, at[1]), xytext=(start, at[0]), arrowprops={"arrowstyle": "->", "color": "black"})
        axes.plot([start, start + 0.5], at, "o", color=color)
        axes.text(start + 0.6, at[1] - 0.1, "theta + e", fontsize=9)
    tidy(axes, title="", xlabel="weights", ylabel="loss")
    return figure


def choice_picture() -> Figure:
    """What ``defense=auto`` asks, and what it keeps."""
    figure = new_figure(7.2, 2.9, "")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set(xlim=(0, 10), ylim=(0, 6))
    boxes = {
        "detects": (2, 5, "MM-BD: does one class\nhave too large a margin?", NEUTRAL),
        "gains alone": (1.2, 2.6, "does MMOM gain?", NEUTRAL),
        "gains": (6, 5, "does MMOM gain?", NEUTRAL),
        "over": (6, 2.6, "is the suspect\nover-predicted?", NEUTRAL),
        "nothing": (0.6, 0.4, "nothing", BEFORE),
        "mmom": (3.6, 0.4, "MMOM", AFTER),
        "mmac": (9.2, 0.4, "MMAC, if it\ncosts little", AFTER),
    }
    patches = {}
    for name, (x, y, text, colour) in boxes.items():
        look = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": colour}
        patches[name] = axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=look).get_bbox_patch()
    FigureCanvasAgg(figure).draw()  # now the boxes have sizes
    ways = [
        ("detects", "gains alone", "no"), ("detects", "gains", "yes"), ("gains alone", "nothing", "no"), ("gains alone", "mmom", "yes"),
        ("gains", "mmac", "no"), ("gains", "over", "yes"), ("over", "mmom", "yes"), ("over", "mmac", "no"),
    ]  # fmt: skip
    for start, end, answer in ways:
        (x1, y1), (x2, y2) = boxes[start][:2], boxes[end][:2]
        arrow = {
            "arrowstyle": "->",
            "color": NEUTRAL,
            "patchA": patches[start],
            "patchB": patches[end],
            "shrinkA": 0,
            "shrinkB": 2,
        }
        axes.annotate("", xy=(x2, y2), xytext=(x1, y1), arrowprops=arrow)
        axes.text(
            (x1 + x2) / 2,
            (y1 + y2) / 2,
            answer,
            fontsize=9,
            ha="center",
            va="center",
            bbox={"fc": "white", "ec": "none", "pad": 1},
        )
    return figure


def calibration_picture() -> Figure:
    """The probabilities of one image of a rare class, as they are and after three corrections of the logits."""
    logits, shifts = np.array([3.0, 2.4, 2.2]), np.array([-1, 0, 1])
    corrections = {
        "f": logits,
        "f / 2": logits / 2,
        "f + beta": logits + shifts,
        "f / 2 + beta": logits / 2 + shifts,
    }
    figure = new_figure(7.2, 2.7, "Probabilities of one image of the rare class")
    for place, (title, values) in enumerate(corrections.items()):
        axes = figure.add_subplot(1, len(corrections), place + 1)
        axes.bar(["common", "medium", "rare"], np.exp(values) / np.exp(values).sum(), color=BEFORE if place == 0 else AFTER)
        axes.set_ylim(0, 1)
        axes.tick_params(axis="x", rotation=30)
        tidy(axes, title=title, xlabel="", ylabel="probability" if place == 0 else "")
    return figure


def features(sizes: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Points (N, 1, 1, 2) of three classes in a plane, as images of two pixels, and their classes (N,)."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    noise = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(seed))
    return (CENTRES[labels] + SPREAD * noise).clamp(0, 1).view(-1, 1, 1, 2), labels


def imbalanced_layer() -> nn.Sequential:
    """A linear layer on two features, fitted to many points of one class and few of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    points, labels = features(TRAINING_SIZES, seed=1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(points), labels) + 1e-4 * model[1].weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return model.eval()


def last_layer_picture(model: nn.Module, defense: Defense) -> Figure:
    """How sure the layer is of its class all over the plane, before and after the method, with points of which each class has as many."""
    points, labels = features((200, 200, 200), seed=3)
    repaired = defense.fit(model, *features((50, 50, 50), seed=2)).network
    axis = torch.linspace(0.1, 0.9, 160)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    plane = torch.stack([columns, rows], -1).view(-1, 1, 1, 2)
    figure = new_figure(6.4, 3.2, "")
    colours = torch.tensor([to_rgb(name) for name in ("tab:blue", "tab:orange", "tab:green")])
    for place, (title, network) in enumerate({"as trained": model, "after the method": repaired}.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        with torch.no_grad():
            probabilities = network(plane).softmax(1)
            right = (network(points).argmax(1) == labels).float().mean()
        axes.imshow((0.25 * probabilities @ colours + 0.75).view(160, 160, 3), origin="lower", extent=(0.1, 0.9, 0.1, 0.9))
        axes.contour(axis, axis, probabilities.argmax(1).view(160, 160), levels=[0.5, 1.5], colors="black", linewidths=0.8)
        for label, (name, size) in enumerate(zip(("common", "medium", "rare"), TRAINING_SIZES, strict=True)):
            own = points[labels == label][::4, 0, 0]
            axes.plot(
                own[:, 0],
                own[:, 1],
                ".",
                color=tuple(colours[label].tolist()),
                markersize=4,
                label=f"{name}, {size} in training",
            )
        tidy(axes, title=f"{title}: {100 * float(right):.0f} % right", xlabel="", ylabel="")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
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
    save_png(cross_entropy_picture(), folder / "loss_cross_entropy.png")
    save_png(mixup_picture(images), folder / "loss_mixup.png")
    save_png(ldam_picture(), folder / "loss_ldam.png")
    save_png(gcl_picture(), folder / "loss_gcl.png")
    save_png(clip_picture(), folder / "method_static_clip.png")
    save_png(inversion_picture(images[0]), folder / "method_neural_cleanse.png")
    save_png(sharpness_picture(), folder / "method_ft_sam.png")
    save_png(calibration_picture(), folder / "method_logit_calibration.png")
    save_png(choice_picture(), folder / "method_auto.png")
    layer = imbalanced_layer()
    for name, method in OF_THE_LAST_LAYER.items():
        save_png(last_layer_picture(layer, method), folder / f"method_{name}.png")


if __name__ == "__main__":
    main()
