"""A clean set that a tiny network has learned: grey images whose bright quarter is the class."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from marginclip.silence import silent_trainer


def quarters(count, seed):
    """``count`` noisy images (count, 1, 8, 8) in [0, 1] and the number of their bright quarter (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.rand(count, 1, 8, 8, generator=generator) * 0.6
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 0.25
    return images.clamp(0, 1), labels


def network(batch_norm):
    """Two convolutions and a dense layer: 4 + 6 feature maps and 8 neurons to bound."""
    norms = (nn.BatchNorm2d(4), nn.BatchNorm2d(6)) if batch_norm else (nn.Identity(), nn.Identity())
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norms[0], nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1), norms[1], nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


def learned(batch_norm):
    torch.manual_seed(0)
    model = network(batch_norm)
    images, labels = quarters(64, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(True)


@pytest.fixture(scope="session")
def _victims():
    return {batch_norm: learned(batch_norm).state_dict() for batch_norm in (False, True)}


@pytest.fixture
def victim(_victims):
    """The trained network, with batch norm."""
    model = network(True)
    model.load_state_dict(_victims[True])
    return model.eval()


@pytest.fixture
def plain_victim(_victims):
    """The trained network without batch norm, so that nothing is folded and arithmetic is the same everywhere."""
    model = network(False)
    model.load_state_dict(_victims[False])
    return model.eval()


@pytest.fixture
def clean():
    """Twenty-four clean images and their labels; the networks classify nearly all correctly."""
    return quarters(24, seed=2)


@pytest.fixture
def draw_quarters():
    """Makes other such images: ``draw_quarters(count, seed)``."""
    return quarters


@pytest.fixture
def fit():
    """The network that a defense gives, run on the CPU in full precision; further settings are the Trainer's."""

    def fit(defense, model, clean, **settings):
        return defense.fit(
            model, *clean, make_trainer=lambda epochs: silent_trainer(epochs, accelerator="cpu", **settings)
        ).network

    return fit


@pytest.fixture
def interrupted_and_resumed(tmp_path):
    """The network of a run that is cut off before step ``at`` and goes on from its last checkpoint, and its defense."""

    class Interrupt(L.Callback):
        def __init__(self, at):
            self.at = at

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == self.at:
                raise RuntimeError("power cut")

    def saving(epochs, *extra):
        saver = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
        return silent_trainer(epochs, accelerator="cpu", enable_checkpointing=True, callbacks=[saver, *extra])

    def run(make, model, clean, *, at):
        with pytest.raises(RuntimeError, match="power cut"):
            make().fit(model, *clean, make_trainer=lambda epochs: saving(epochs, Interrupt(at)))
        again = make()
        return again.fit(model, *clean, make_trainer=saving, resume=tmp_path / "last.ckpt").network, again

    return run


IMBALANCED_COUNTS = [200, 60, 20, 6]


def noisy_quarters(count, seed):
    """Quarters that cannot all be told apart, so that the frequencies of the classes matter."""
    images, labels = quarters(count, seed)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + 0.4 * noise).clamp(0, 1), labels


@pytest.fixture(scope="session")
def _imbalanced():
    torch.manual_seed(0)
    model = network(True)
    images, labels = noisy_quarters(800, seed=1)
    kept = torch.cat([(labels == label).nonzero().flatten()[:count] for label, count in enumerate(IMBALANCED_COUNTS)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images[kept]), labels[kept])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.fixture
def imbalanced(_imbalanced):
    """A network trained on 200, 60, 20 and 6 images of its classes; 50 clean images of each, and 500 of each to be judged by."""
    model = network(True)
    model.load_state_dict(_imbalanced)
    return model.eval(), noisy_quarters(200, seed=2), noisy_quarters(2000, seed=3)
