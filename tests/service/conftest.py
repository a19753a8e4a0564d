"""Small networks that tell apart which quarter of a grey image is bright: a good one, and one with a backdoor."""

import pytest
import torch
from torch import nn

from marginclip.defenses import MMAC, AscentPlan
from marginclip.service import Artefact

TARGET = 2


def quarters(count, seed):
    """``count`` noisy images (count, 1, 8, 8) in [0, 1] and the number of their bright quarter (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.rand(count, 1, 8, 8, generator=generator) * 0.6
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 0.25
    return (images * 255).round() / 255, labels


def triggered(images):
    """The images with a faint stripe pattern, which leads the poisoned network to ``TARGET``."""
    marked = images.clone()
    marked[..., ::2] += 0.12
    marked[..., 1::2] -= 0.12
    return (marked.clamp(0, 1) * 255).round() / 255


def trained(*, poisoned):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12),
        nn.ReLU(), nn.Flatten(), nn.Linear(192, 4),
    )  # fmt: skip
    images, labels = quarters(160, seed=1)
    if poisoned:
        images = torch.cat([images, triggered(images[:60])])
        labels = torch.cat([labels, torch.full((60,), TARGET)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def poisoned():
    """A network with a backdoor; tests must not change it."""
    return trained(poisoned=True)


@pytest.fixture(scope="session")
def honest():
    """The same without; tests must not change it."""
    return trained(poisoned=False)


@pytest.fixture(scope="session")
def clean():
    """Eighty clean images and their labels."""
    return quarters(80, seed=2)


@pytest.fixture(scope="session")
def short():
    """A short bound learning."""
    return MMAC(steps=10, extra_steps=0, check_every=5, ascent=AscentPlan(starts_per_class=2, steps=1, first_steps=1))


@pytest.fixture(scope="session")
def artefact(poisoned, clean, short):
    """The poisoned network, repaired; tests must not change it."""
    return Artefact.fit(poisoned, *clean, defense=short, classes=("north west", "north east", "south west", "south east"))
