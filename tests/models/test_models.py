"""Classifiers: sizes of the papers' networks, normalisation inside, activations by name, bad settings."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.errors import UserError
from marginclip.models import ResNet, TorchvisionModel
from marginclip.models.activations import ACTIVATIONS, make_activation
from marginclip.models.normalize import Normalize, make_normalize
from marginclip.models.resnet import PadShortcut


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"blocks": (5, 5, 5), "width": 16, "shortcut": "pad"}, 464_154),  # ResNet-32
        ({"blocks": (3, 3, 3), "width": 16, "shortcut": "pad"}, 269_722),  # ResNet-20
        ({}, 11_173_962),  # the CIFAR ResNet-18
    ],
)
def test_networks_have_the_published_number_of_parameters(settings, count):
    assert parameters(ResNet(10, **settings)) == count


@pytest.mark.parametrize(("shortcut", "shape"), [("pad", (3, 32, 32)), ("projection", (1, 28, 28)), ("pad", (3, 8, 13))])
def test_any_image_from_8_pixels_up_gives_logits(shortcut, shape):
    model = ResNet(4, shape[0], blocks=(1, 1, 1), width=4, shortcut=shortcut).eval()
    assert model(torch.rand(2, *shape)).shape == (2, 4)


def test_forward_equals_the_network_written_out(settle):
    model = settle(ResNet(4, blocks=(1, 1), width=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    images = torch.rand(2, 3, 8, 8)
    x = (images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    x = F.relu(model.bn1(model.conv1(x)))
    first, second = model.layer1[0], model.layer2[0]
    x = F.relu(first.bn2(first.conv2(F.relu(first.bn1(first.conv1(x))))) + x)
    x = F.relu(second.bn2(second.conv2(F.relu(second.bn1(second.conv1(x))))) + second.shortcut[1](second.shortcut[0](x)))
    torch.testing.assert_close(model(images), model.linear(x.mean((2, 3))))


def test_pad_shortcut_takes_every_second_pixel_and_adds_zero_channels():
    x = torch.rand(2, 3, 5, 4)
    out = PadShortcut(3, 8, 2)(x)
    expected = torch.zeros(2, 8, 3, 2)
    for channel in range(3):
        expected[:, channel + 2] = x[:, channel, ::2, ::2]
    assert torch.equal(out, expected)


def test_parameter_names_are_the_common_ones_and_statistics_stay_out():
    names = set(ResNet(10, mean=(0.5,) * 3, std=(0.2,) * 3).state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer2.0.shortcut.0.weight", "linear.bias"} <= names
    assert not any(name.startswith("normalize") for name in names)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_option_changes_every_activation(name):
    model = ResNet(4, blocks=(1, 1), width=4, activation=name, negative_slope=0.3)
    made = [module for module in model.modules() if isinstance(module, tuple(ACTIVATIONS.values()))]
    assert {type(module) for module in made} == {ACTIVATIONS[name]}
    assert len(made) == 5
    assert len(set(map(id, made))) == 5
    if name == "leaky_relu":
        assert {module.negative_slope for module in made} == {0.3}


def test_normalisation_is_a_loop_over_channels_and_moves_with_the_model():
    images, mean, std = torch.rand(2, 3, 4, 4), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    layer = make_normalize(3, mean, std)
    for channel in range(3):
        expected = (images[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(layer(images)[:, channel], expected)
    assert layer.double()(images.double()).dtype == torch.float64
    assert isinstance(make_normalize(3, None, None), nn.Identity)


def test_torchvision_networks_normalise_inside():
    model = TorchvisionModel(5, network="squeezenet1_1").eval()
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(model(images), model.network((images - mean) / std))
    assert model(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(1), "at least 2 classes, got 1"),
        (lambda: ResNet(2, width=0), "model.width must be at least 1, got 0"),
        (lambda: ResNet(2, shortcut="identity"), "'projection' or 'pad', got 'identity'"),
        (lambda: ResNet(2, blocks=()), "model.blocks"),
        (lambda: ResNet(2, blocks=(2, 0)), "model.blocks"),
        (lambda: ResNet(2, mean=(0.5,) * 3), "must be given together"),
        (lambda: ResNet(2, 1, mean=(0.5,) * 3, std=(0.2,) * 3), r"one value a channel \(1\), got 3"),
        (lambda: Normalize((0.5, 0.5), (0.2,)), "same length, got 2 and 1"),
        (lambda: Normalize((0.5,), (0.0,)), r"must be positive, got \[0.0\]"),
        (lambda: make_activation("rellu"), "got 'rellu'; did you mean 'relu'?"),
        (lambda: TorchvisionModel(2, network="resnet8"), "'resnet8' is not a torchvision classifier; did you mean 'resnet"),
        (lambda: TorchvisionModel(2, 1), "takes 3-channel images, the data set has 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_weights_of_other_classes_are_refused_before_they_are_downloaded():
    with pytest.raises(UserError, match=r"model\.weights=DEFAULT has 1000 classes, the data set 10: set model\.weights=null"):
        TorchvisionModel(10, network="resnet18", weights="DEFAULT")
