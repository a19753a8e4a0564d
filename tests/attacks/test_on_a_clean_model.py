"""What triggers do to a model that never saw one: the success rate is the rate at which it confuses images with the target anyway."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.attacks import AllToOne, BadNet, Blend, Chessboard, CleanLabel, WaNet
from marginclip.data import MnistSubset

TARGET = 3


def share(mask):
    return float(mask.float().mean())


@pytest.fixture(scope="module")
def clean_model():
    """A small convolutional network, four passes over 3,500 real digits, and the held-out digits."""
    torch.manual_seed(0)
    splits = MnistSubset(held_out_share=0.3, split_seed=0).load()
    images, labels = splits.train.images[torch.arange(len(splits.train))].float() / 255, splits.train.labels
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(4):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    held_out = splits.held_out
    return model.eval(), held_out.images[torch.arange(len(held_out))].float() / 255, held_out.labels


@pytest.mark.parametrize("attack", [BadNet, Blend, Chessboard, WaNet, CleanLabel])
def test_success_rate_is_the_confusion_rate(clean_model, attack):
    model, images, labels = clean_model
    setting = AllToOne(10, target=TARGET)
    made = attack(setting, (1, 28, 28), seed=0)
    sources = setting.eligible(labels)
    with torch.no_grad():
        clean, triggered = (model(batch).argmax(1) for batch in (images[sources], made(images[sources])))
    accuracy, confusion = share(clean == labels[sources]), share(clean == TARGET)
    success, poisoned_accuracy = share(triggered == TARGET), share(triggered == labels[sources])
    assert accuracy > 0.92
    assert confusion < 0.02  # about the error rate over K - 1, far from 1 / K
    assert success == pytest.approx(confusion, abs=0.02)
    assert poisoned_accuracy == pytest.approx(accuracy, abs=0.04)
