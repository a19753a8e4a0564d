"""Narrow networks are trained in a layout that does not corrupt memory, in a process of their own: a corrupted one aborts."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from marginclip.models import ResNet
from marginclip.networks.layout import in_layout, training_layout

TRAIN = """
import torch
from marginclip.data import Augment
from marginclip.defenses import FineTune
from marginclip.models import ResNet
from marginclip.silence import silent_trainer
from marginclip.training import PoisonedTraining
from functools import partial

torch.manual_seed(0)
def batches(channels):
    for _ in range(40):
        images = torch.rand(64, channels, 32, 32).contiguous(memory_format=torch.channels_last)
        yield {"images": images, "labels": torch.randint(0, 4, (64,))}

for width, channels in ((4, 1), (4, 3), (6, 1), (6, 3)):
    print(width, channels, flush=True)
    model = ResNet(num_classes=4, in_channels=channels, blocks=[1, 1, 1], width=width)
    training = PoisonedTraining(model, optimizer=partial(torch.optim.SGD, lr=0.01))
    loader = torch.utils.data.DataLoader(list(batches(channels)), batch_size=None)
    silent_trainer(1, accelerator="cpu").fit(training, loader)
    images = torch.rand(512, channels, 32, 32).contiguous(memory_format=torch.channels_last)
    defense = FineTune(epochs=2, batch_size=64, augmentation=Augment(crop_padding=2))
    defense.fit(model, images, torch.arange(512) % 4, make_trainer=lambda epochs: silent_trainer(epochs, accelerator="cpu"))
print("trained")
"""


def test_narrow_networks_are_trained_to_the_end():
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, timeout=480)
    assert (done.returncode, done.stdout) == (0, "4 1\n4 3\n6 1\n6 3\ntrained\n"), done.stderr


@pytest.mark.parametrize(
    ("width", "layout"), [(4, torch.contiguous_format), (7, torch.contiguous_format), (8, torch.channels_last)]
)
def test_the_layout_follows_from_the_narrowest_shortcut(width, layout):
    assert training_layout(ResNet(num_classes=4, blocks=[1, 1], width=width)) is layout


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, stride=2), nn.Conv2d(8, 16, 1, stride=2), nn.Linear(4, 8)],
)
def test_other_layers_stay_channels_last(layer):
    assert training_layout(nn.Sequential(layer)) is torch.channels_last


def test_images_of_one_channel_are_told_apart_by_their_strides():
    grey = torch.rand(5, 1, 4, 6).contiguous(memory_format=torch.channels_last).clone()
    both = grey.as_strided(grey.shape, (24, 1, 6, 1))
    assert both.is_contiguous()
    plain = in_layout(both, torch.contiguous_format)
    assert plain.stride() == (24, 24, 6, 1)
    assert torch.equal(plain, both)
    assert in_layout(plain, torch.contiguous_format) is plain
