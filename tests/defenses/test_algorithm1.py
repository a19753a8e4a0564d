"""The schedule ``algorithm`` against Algorithm 1 of the paper, written out slowly and without any of our code but the random draws."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from marginclip.experiment.command import plain
from marginclip.experiment.spec import run_spec
from marginclip.experiment.stages import make_methods

CONF = Path(__file__).parents[2] / "conf"
STEPS, ASCENT_STEPS, REFRESH, STARTS = 5, 6, 3, 2


@pytest.fixture
def algorithm():
    """The defense of ``defense/schedule=algorithm`` with its own settings, but for how many steps, starts and images it takes."""
    counts = [
        f"defense.steps={STEPS}", f"defense.ascent.first_steps={ASCENT_STEPS}", f"defense.ascent.steps={ASCENT_STEPS}",
        f"defense.ascent.refresh_every={REFRESH}", f"defense.ascent.starts_per_class={STARTS}", "seed=7",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("defend", ["defense=mmac", "defense/schedule=algorithm", *counts])
    return make_methods(run_spec(plain(config))).defense


def clipped(model, bounds, images):
    """The logits of the small test network with every activation cut at its bound."""
    values = images
    sites = iter(bounds)
    for layer in model:
        values = layer(values)
        if isinstance(layer, torch.nn.ReLU):
            bound = next(sites)
            values = torch.minimum(values, bound.view(1, -1, 1, 1) if values.dim() == 4 else bound)
    return values


def gaps(logits, wanted):
    """Each wanted class's logit minus the largest of the others, one image at a time."""
    return torch.stack(
        [
            row[label] - max(row[other] for other in range(len(row)) if other != label)
            for row, label in zip(logits, wanted, strict=True)
        ]
    )


def slow(model, images, labels):
    """Algorithm 1: maximise the margin of every class on the bounded network, then lower it by the bounds; lambda by the accuracy."""
    keep = model(images).argmax(1) == labels
    images, labels = images[keep], labels[keep]
    target = model(images).detach()
    bounds = [torch.ones(size, requires_grad=True) for size in (4, 6, 8)]
    first, second = ([torch.zeros_like(bound) for bound in bounds] for _ in range(2))
    lambda_, wanted, history = 0.1, torch.arange(4).repeat_interleave(STARTS), []
    for step in range(STEPS):
        if step % REFRESH == 0:
            start = torch.rand(len(wanted), *images.shape[1:], generator=torch.Generator().manual_seed(7 * 1_000_003 + step))
            inputs, best, found = start, None, start
            for ascent in range(ASCENT_STEPS + 1):
                inputs = inputs.detach().requires_grad_(True)
                values = gaps(clipped(model, bounds, inputs), wanted)
                better = torch.ones(len(wanted), dtype=bool) if best is None else values.detach() > best
                best = values.detach() if best is None else torch.maximum(best, values.detach())
                found = torch.where(better.view(-1, 1, 1, 1), inputs.detach(), found)
                if ascent < ASCENT_STEPS:
                    (gradient,) = torch.autograd.grad(values.sum(), inputs)
                    inputs = (inputs + 0.01 * gradient).clamp(0, 1)
        loss = ((clipped(model, bounds, images) - target) ** 2).mean() + lambda_ * gaps(
            clipped(model, bounds, found), wanted
        ).mean()
        gradients = torch.autograd.grad(loss, bounds)
        with torch.no_grad():
            for number, (bound, gradient) in enumerate(zip(bounds, gradients, strict=True)):
                first[number] = 0.9 * first[number] + 0.1 * gradient
                second[number] = 0.999 * second[number] + 0.001 * gradient**2
                corrected = first[number] / (1 - 0.9 ** (step + 1)), second[number] / (1 - 0.999 ** (step + 1))
                bound -= 0.1 * corrected[0] / (corrected[1].sqrt() + 1e-8)
                bound.clamp_(min=0)
        accuracy = float((clipped(model, bounds, images).argmax(1) == labels).float().mean())
        lambda_ = lambda_ * 1.2 if accuracy >= 0.95 else lambda_ / 1.2
        history.append((accuracy, lambda_))
    return bounds, history


def test_the_schedule_is_algorithm_1(plain_victim, clean, algorithm, fit):
    wanted, history = slow(plain_victim, *clean)
    network = fit(algorithm, plain_victim, clean)
    for (_, bound), value in zip(network.each(), wanted, strict=True):
        torch.testing.assert_close(bound.upper.detach(), value.detach(), rtol=1e-4, atol=1e-4)
    assert len({value for _, value in history}) > 1  # lambda moved
    entries = algorithm.history[1:]
    assert [entry["lambda"] for entry in entries] == pytest.approx([value for _, value in history])
    assert [entry["agreement"] for entry in entries] == pytest.approx([accuracy for accuracy, _ in history])


def test_the_slow_version_moves_its_bounds(plain_victim, clean):
    """It is no toy: bounds move, and stay feasible."""
    bounds, _ = slow(plain_victim, *clean)
    assert not all(torch.equal(bound, torch.ones_like(bound)) for bound in bounds)
    assert F.relu(-torch.cat([bound.detach() for bound in bounds])).sum() == 0
