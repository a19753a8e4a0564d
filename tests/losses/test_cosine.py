"""The cosine classifier: cosines by hand, put into any model's place of the last layer, saved, traced and bounded."""

import copy

import pytest
import torch
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.errors import UserError
from marginclip.losses import CosineLinear, final_layer, with_cosine_head
from marginclip.maxmargin import margin
from marginclip.models import ResNet, TorchvisionModel
from marginclip.networks.tracing import trace


def resnet(seed=0):
    torch.manual_seed(seed)
    return ResNet(10, 3, blocks=(1, 1, 1), width=4).eval()


def test_logits_are_scaled_cosines_by_hand():
    weight, features = torch.randn(4, 6), torch.randn(3, 6)
    logits = CosineLinear(weight, scale=30)(features)
    for image in range(3):
        for label in range(4):
            cosine = float(features[image] @ weight[label]) / (features[image].norm() * weight[label].norm())
            assert logits[image, label].item() == pytest.approx(30 * float(cosine), abs=1e-4)
    assert logits.abs().max() <= 30


def test_it_starts_in_the_directions_of_the_linear_layer_with_unit_rows():
    model = resnet()
    twin = with_cosine_head(model, 10, scale=20)
    assert isinstance(model.linear, nn.Linear)  # the model given is as it was
    torch.testing.assert_close(twin.linear.weight.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(twin.linear.weight * model.linear.weight.norm(dim=1, keepdim=True), model.linear.weight)
    assert list(twin.linear.state_dict()) == ["weight", "scale"]


def test_another_scale_keeps_the_weights_of_a_cosine_head():
    first = with_cosine_head(resnet(), 10, scale=30)
    first.linear.weight.data *= 3
    second = with_cosine_head(first, 10, scale=20)
    assert torch.equal(second.linear.weight, first.linear.weight)
    assert (float(first.linear.scale), float(second.linear.scale)) == (30, 20)


def test_scale_and_weights_come_back_from_a_state_dict():
    images = torch.rand(4, 3, 16, 16)
    one, other = with_cosine_head(resnet(), 10, scale=20).eval(), with_cosine_head(resnet(1), 10, scale=30).eval()
    assert not torch.equal(one(images), other(images))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(images), other(images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11", "densenet121", "googlenet"])
def test_the_last_layer_of_torchvision_models_is_found(name):
    model = TorchvisionModel(7, network=name).eval()
    twin = with_cosine_head(model, 7, scale=5.0).eval()
    with torch.no_grad():
        logits = twin(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 7)
    assert 0.01 < logits.abs().max() <= 5.0001


def test_the_second_outputs_that_some_networks_have_in_training_are_left_out():
    model = TorchvisionModel(7, network="googlenet").train()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    assert BoundedNetwork(model.eval(), torch.rand(3, 64, 64))(torch.rand(2, 3, 64, 64)).shape == (2, 7)


def test_a_linear_model_is_its_own_last_layer():
    layer = nn.Linear(5, 3)
    assert final_layer(layer) == ""
    assert isinstance(with_cosine_head(layer, 3, scale=1.0), CosineLinear)


def test_models_without_such_a_layer_are_refused():
    with pytest.raises(UserError, match=r"Sequential has no nn\.Linear as its last layer.*loss=cross_entropy"):
        with_cosine_head(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), 4, scale=1.0)
    with pytest.raises(UserError, match=r"the last linear layer '0' of Sequential gives 8 values, not 4 logits"):
        with_cosine_head(nn.Sequential(nn.Linear(3, 8), nn.ReLU()), 4, scale=1.0)


def test_traced_it_has_its_weights_and_scale():
    model = with_cosine_head(resnet(), 10, scale=20)
    assert trace(model).state_dict().keys() == model.state_dict().keys()


def test_infinite_bounds_leave_its_logits_bit_for_bit_and_finite_ones_are_learned(settle):
    model, images = with_cosine_head(settle(resnet()), 10, scale=20).eval(), torch.rand(6, 3, 16, 16)
    bounded = BoundedNetwork(model, images[:1])
    assert torch.equal(bounded(images), model(images))
    assert torch.equal(copy.deepcopy(bounded)(images), model(images))
    bounded.set_from_images(images, share=0.5)
    assert not torch.equal(bounded(images), model(images))
    torch.testing.assert_close(bounded.fused()(images), bounded(images), rtol=1e-3, atol=1e-3)
    margins = margin(bounded(images), torch.zeros(6, dtype=torch.long))
    assert margins.abs().max() <= 40  # 2 * scale
    gradients = torch.autograd.grad(margins.sum(), bounded.bound_parameters(), allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
