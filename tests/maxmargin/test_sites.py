"""Finding activation calls: kinds, channel axes, and taking in-place calls out of place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.errors import UserError
from marginclip.maxmargin.sites import TWO_SIDED_MODULES, find_sites, make_out_of_place, trace
from marginclip.models import ResNet, TorchvisionModel

IMAGE = torch.rand(1, 3, 16, 16)


class Function(nn.Module):
    """A function of one image batch as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def sites_of(model, **settings):
    return find_sites(trace(model), IMAGE, **settings)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, *TWO_SIDED_MODULES])
def test_only_functions_that_reach_below_zero_are_two_sided(kind):
    activation = kind()
    (site,) = sites_of(nn.Sequential(nn.Conv2d(3, 5, 1), activation))
    reaches_below = kind is nn.Softplus or activation.eval()(torch.linspace(-4, 4, 99)).min().item() < 0
    assert (site.two_sided, site.num_channels, site.axis, site.num_axes) == (reaches_below, 5, 1, 4)


@pytest.mark.parametrize(
    "function",
    [
        F.relu, torch.relu, F.relu_, torch.relu_, F.relu6, lambda x: x.relu(), lambda x: x.relu_(),
        lambda x: x.clamp(0), lambda x: x.clamp(min=0.0), lambda x: torch.clamp(x, 0, None), lambda x: torch.clamp_min(x, 0),
        lambda x: x.clamp_min_(0), lambda x: F.relu(x, inplace=True), lambda x: F.relu(x, True),
    ],
)  # fmt: skip
def test_every_spelling_of_relu_is_one_site(function):
    traced = trace(Function(function))
    (site,) = find_sites(traced, IMAGE)
    assert not site.two_sided
    expected = traced(IMAGE - 0.5)
    make_out_of_place(traced, site.node)
    traced.recompile()
    kept = IMAGE - 0.5
    assert torch.equal(traced(kept), expected)
    assert torch.equal(kept, IMAGE - 0.5)  # nothing is overwritten any more


@pytest.mark.parametrize("function", [lambda x: x.clamp(0, 1), lambda x: x.clamp(max=0), lambda x: x.clamp(min=0.5), torch.abs])
def test_other_functions_are_no_activations(function):
    assert sites_of(Function(function)) == []


@pytest.mark.parametrize(
    ("layers", "axis"),
    [
        ([nn.Linear(16, 7), nn.GELU()], 3),
        ([nn.Linear(16, 7), nn.Dropout(), nn.Identity(), nn.GELU()], 3),
        ([nn.LayerNorm(16), nn.GELU()], 3),
        ([nn.Conv2d(3, 7, 1), nn.BatchNorm2d(7), nn.Dropout(), nn.GELU()], 1),
        ([nn.Linear(16, 16), nn.Conv2d(3, 7, 1), nn.GELU()], 1),
        ([nn.Flatten(), nn.Linear(768, 7), nn.GELU()], 1),
        ([nn.GELU()], 1),
    ],
)
def test_channels_are_last_behind_dense_layers_and_first_behind_convolutions(layers, axis):
    (site,) = sites_of(nn.Sequential(*layers))
    assert site.axis == axis


def test_channel_axis_overrides_all_but_dense_activations():
    model = nn.Sequential(nn.Conv2d(3, 7, 1), nn.GELU(), nn.Flatten(), nn.Linear(7 * 256, 5), nn.ReLU())
    assert [site.axis for site in sites_of(model, channel_axis=-1)] == [3, 1]


def test_calls_are_listed_in_the_order_of_execution():
    names = [site.name for site in sites_of(ResNet(4, blocks=(1, 1), width=4))]
    assert names == ["000_act1", "001_layer1_0_act1", "002_layer1_0_act2", "003_layer2_0_act1", "004_layer2_0_act2"]


def test_networks_of_torchvision_are_traced():
    model = TorchvisionModel(3, network="mobilenet_v3_small", weights=None)
    assert len(sites_of(model)) == sum(type(part).__name__ in ("ReLU", "Hardswish") for part in model.modules())


def test_tracing_copies_and_leaves_the_model_in_its_mode():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True)).train()
    traced = trace(model)
    assert model.training
    assert not traced.training
    assert {value.data_ptr() for value in model.state_dict().values()}.isdisjoint(
        value.data_ptr() for value in traced.state_dict().values()
    )


def test_an_activation_of_something_without_a_batch_is_refused():
    with pytest.raises(UserError, match=r"gives no batch of feature maps \(shape \(\)\)"):
        sites_of(Function(lambda x: x + x.mean().relu()))
