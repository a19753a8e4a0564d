"""What is said of models and images that are not as they should be."""

import logging

import pytest
import torch
from torch import nn

from marginclip.errors import UserError
from marginclip.networks.logits import check_clean_set, check_images, class_numbers, warn_if_poor


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_a_model_that_ends_in_softmax_is_warned_of(linear, caplog):
    images = torch.rand(12, 1, 4, 4)
    labels = linear(images).argmax(1)
    with caplog.at_level(logging.WARNING):
        warn_if_poor(linear, images, labels)
        assert not caplog.records
        warn_if_poor(nn.Sequential(linear, nn.Softmax(1)), images, labels)
    assert [record.getMessage() for record in caplog.records] == [
        "the model seems to end in a softmax: give one that returns logits, since margins are differences of logits"
    ]


def test_bytes_are_to_be_divided():
    with pytest.raises(UserError, match="images must be float32 or float64; divide bytes by 255, got uint8"):
        check_images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_whole_numbers_become_int64(kind):
    assert torch.equal(class_numbers(torch.tensor([0, 2, 1]).to(kind)), torch.tensor([0, 2, 1]))


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.cfloat)])
def test_labels_that_are_not_whole_numbers_are_refused(labels):
    assert class_numbers(labels) is labels
    with pytest.raises(UserError, match="labels must be whole numbers"):
        check_clean_set(torch.zeros(3, 1, 2, 2), labels, 2)
