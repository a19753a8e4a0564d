"""The networks of the field's benchmarks: sizes, forward passes written out, and that bounds can be put on them."""

import pytest
import torch
import torch.nn.functional as F

from marginclip.clipping import BoundedNetwork
from marginclip.errors import UserError
from marginclip.models import VGG, PreActResNet, ViT


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_preact_resnet18_has_its_convolutions_norms_and_linear_layer():
    count = 3 * 64 * 9 + 512 * 10 + 10
    channels = 64
    for width in (64, 128, 256, 512):
        count += 2 * channels + 9 * channels * width + 2 * width + 9 * width * width  # first block
        count += channels * width if channels != width else 0
        count += 2 * (2 * width + 9 * width * width)  # second block
        channels = width
    assert parameters(PreActResNet(10)) == count


def test_vgg19_has_sixteen_convolutions():
    widths = [64, 64, 128, 128, *[256] * 4, *[512] * 8]
    pairs = zip([3, *widths], widths, strict=False)
    assert parameters(VGG(10)) == sum(9 * before * after + after + 2 * after for before, after in pairs) + 512 * 10 + 10


def test_vit_small_has_a_token_for_each_patch_and_one_more():
    model = ViT(10)
    assert model.network.encoder.pos_embedding.shape == (1, 65, 384)
    layer = 4 * 384 * 384 + 4 * 384 + 8 * 384 * 384 + 5 * 384 + 4 * 384
    ends = 3 * 16 * 384 + 384 + 384 + 65 * 384 + 2 * 384 + 384 * 10 + 10
    assert parameters(model) == 12 * layer + ends


def test_preact_resnet_is_the_network_written_out(settle):
    model = settle(PreActResNet(4, blocks=(1, 1), width=4))
    images = torch.rand(2, 3, 8, 8)
    x = model.conv1(images)
    first, second = model.layer1[0], model.layer2[0]
    x = first.conv2(F.relu(first.bn2(first.conv1(F.relu(first.bn1(x)))))) + x
    activated = F.relu(second.bn1(x))
    x = second.conv2(F.relu(second.bn2(second.conv1(activated)))) + second.shortcut[0](activated)
    torch.testing.assert_close(model(images), model.linear(x.mean((2, 3))))


def test_vgg_is_the_network_written_out(settle):
    model = settle(VGG(4, blocks=(1, 2), width=4))
    x = torch.rand(2, 3, 8, 8)
    images, layers = x, list(model.features)
    for start, pooled in ((0, True), (4, False), (7, True)):
        x = F.relu(layers[start + 1](layers[start](x)))
        x = F.max_pool2d(x, 2) if pooled else x
    torch.testing.assert_close(model(images), model.classifier(x.mean((2, 3))))


SMALL = [
    lambda channels: PreActResNet(4, channels, blocks=(1, 1), width=4),
    lambda channels: VGG(4, channels, blocks=(1, 1, 1), width=4),
    lambda channels: ViT(4, channels, image_size=28, patch_size=7, layers=2, heads=2, width=8),
]


@pytest.mark.parametrize("make", SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_bounds_that_are_never_reached_change_nothing_and_tight_ones_do(make, channels):
    torch.manual_seed(0)
    model = make(channels).eval()
    images = torch.rand(3, channels, 28, 28)
    bounded = BoundedNetwork(model, images[:1])
    logits = model(images)
    assert logits.shape == (3, 4)
    torch.testing.assert_close(bounded(images), logits)
    bounded.set_constant(0.01)
    assert not torch.allclose(bounded(images), logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreActResNet(1), "at least 2 classes, got 1"),
        (lambda: PreActResNet(2, blocks=()), "model.blocks must be a list"),
        (lambda: VGG(2, width=0), "model.width must be at least 1, got 0"),
        (lambda: VGG(2, blocks=(0,)), r"counts from 1 up, got \[0\]"),
        (lambda: ViT(2, patch_size=5), "model.image_size must be a multiple of model.patch_size, got 32 and 5"),
        (lambda: ViT(2, width=7), "model.width must be a multiple of model.heads, got 7 and 6"),
        (lambda: ViT(2, layers=0), "model.layers must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
