"""Finding activation calls: kinds, channel axes, and taking in-place calls out of place."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.clipping.activations import find_sites, make_out_of_place
from marginclip.errors import UserError
from marginclip.models import ResNet, TorchvisionModel
from marginclip.networks.tracing import ONE_SIDED_MODULES, TWO_SIDED_MODULES, called, trace

IMAGE = torch.rand(1, 3, 16, 16)


class Function(nn.Module):
    """A function of one image batch as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def sites_of(model, **settings):
    return find_sites(trace(model, IMAGE), IMAGE, **settings)


@pytest.mark.parametrize("kind", [*ONE_SIDED_MODULES, *TWO_SIDED_MODULES])
def test_only_functions_that_reach_below_zero_are_two_sided(kind, traced_by):
    activation = {nn.Threshold: partial(nn.Threshold, -1.0, -2.0), nn.GLU: partial(nn.GLU, 1)}.get(kind, kind)()
    (site,) = sites_of(traced_by(nn.Sequential(nn.Conv2d(3, 10 if kind is nn.GLU else 5, 1), activation)))
    reaches_below = activation.eval()(torch.linspace(-4, 4, 100).view(2, 50)).min().item() < 0
    assert (site.two_sided, site.num_channels, site.axis, site.num_axes) == (reaches_below, 5, 1, 4)


@pytest.mark.parametrize(
    "function",
    [
        F.relu, torch.relu, F.relu_, torch.relu_, F.relu6, lambda x: x.relu(), lambda x: x.relu_(),
        lambda x: x.clamp(0), lambda x: x.clamp(min=0.0), lambda x: torch.clamp(x, 0, None), lambda x: torch.clamp_min(x, 0),
        lambda x: x.clamp_min_(0), lambda x: F.relu(x, inplace=True), lambda x: F.relu(x, True),
    ],
)  # fmt: skip
def test_every_spelling_of_relu_is_one_site(function, traced_by):
    traced = trace(traced_by(Function(function)), IMAGE)
    (site,) = find_sites(traced, IMAGE)
    assert not site.two_sided
    expected = traced(IMAGE - 0.5).clone()
    make_out_of_place(traced, [site.node])
    traced.recompile()
    kept = IMAGE - 0.5
    assert torch.equal(traced(kept), expected)
    assert torch.equal(kept, IMAGE - 0.5)  # nothing is overwritten any more


class Middle(Function):
    """A function of feature maps."""

    def __init__(self, function):
        super().__init__(function)
        self.first, self.gate, self.sigmoid = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Sigmoid()
        self.hardtanh, self.threshold = nn.Hardtanh(0.0, 6.0), nn.Threshold(0.0, 0.0)

    def forward(self, x):
        return self.function(self, self.first(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda net, h: h * torch.sigmoid(h), lambda net, h: net.sigmoid(h) * h, lambda net, h: h.mul(h.sigmoid()),
        lambda net, h: h.mul_(torch.sigmoid(h)), lambda net, h: h * torch.sigmoid(1.702 * h), lambda net, h: h * (h > -1),
        lambda net, h: 0.5 * h * (1 + torch.erf(h / 2**0.5)), lambda net, h: 0.5 * (h * (1 + torch.erf(h / 2**0.5))),
        lambda net, h: torch.tanh(h), lambda net, h: h.tanh(), lambda net, h: F.threshold(h, 0.1, -1.0), lambda net, h: F.glu(h, 1),
        lambda net, h: F.hardtanh_(h), lambda net, h: F.hardtanh(h, -2.0, 6.0, True), lambda net, h: h / (1 + torch.exp(-h)),
        lambda net, h: h / (1 + h.abs()), lambda net, h: F.softshrink(h, 0.01), lambda net, h: F.logsigmoid(h),
    ],
)  # fmt: skip
def test_activations_written_out_are_two_sided_sites(function, traced_by):
    model = traced_by(Middle(function).eval())
    (site,) = sites_of(model)
    assert site.two_sided
    bounded = BoundedNetwork(model, IMAGE)
    assert torch.equal(bounded(IMAGE), model(IMAGE))
    bounded.set_constant(0.01)
    assert (bounded(IMAGE) != model(IMAGE)).any()


@pytest.mark.parametrize(
    "function",
    [
        lambda net, h: F.hardtanh(h, 0.0, 6.0), lambda net, h: F.hardtanh(h, min_val=0.0, max_val=6.0, inplace=True),
        lambda net, h: net.hardtanh(h), lambda net, h: F.threshold(h, 0.0, 0.0), lambda net, h: F.threshold(h, 0.1, value=0.0),
        lambda net, h: net.threshold(h), lambda net, h: F.softplus(h), lambda net, h: h * (h > 0), lambda net, h: h.gt(0.0) * h,
        lambda net, h: h * (h > 0).float(), lambda net, h: h * (h > 0).to(h.dtype), lambda net, h: torch.where(h > 0, h, 0.0),
        lambda net, h: torch.maximum(h, torch.zeros_like(h)),
    ],
)  # fmt: skip
def test_what_gives_nothing_below_zero_has_no_lower_bound(function, traced_by):
    (site,) = sites_of(traced_by(Middle(function)))
    assert not site.two_sided


@pytest.mark.parametrize(
    "function",
    [
        lambda net, h: torch.where(h > 0.5, h, 0.0), lambda net, h: torch.where(h > 0, h, 1.0), lambda net, h: torch.where(h > 0, 1.0, 0.0),
        lambda net, h: torch.maximum(h, net.gate(h)), lambda net, h: h / h.abs().amax((2, 3), keepdim=True), lambda net, h: h / 2,
    ],
)  # fmt: skip
def test_choices_and_quotients_that_are_no_activations_are_none(function, traced_by):
    assert sites_of(traced_by(Middle(function))) == []


def test_every_product_of_a_chain_of_them_is_a_site(traced_by):
    def names_of(function):
        return [str(called(site.node)) for site in sites_of(traced_by(Middle(function)))]

    def twice(net, h):
        h = h * torch.sigmoid(h)
        return h * torch.sigmoid(h)

    assert len(names_of(twice)) == 2
    assert len(names_of(lambda net, h: h * torch.tanh(F.softplus(h)))) == 3  # mish: softplus, tanh and the product
    assert len(names_of(lambda net, h: h * F.relu6(h + 3) / 6)) == 2  # hard swish: relu6 and the product


def test_a_clamp_of_feature_maps_is_one_but_one_of_the_images_is_none(traced_by):
    (site,) = sites_of(traced_by(Middle(lambda net, h: h.clamp(0, 6))))
    assert not site.two_sided
    for function in (lambda x: x.clamp(0, 1), lambda x: (2 * x - 1).clamp(0, 1)):
        assert sites_of(traced_by(Function(function))) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda net, h: h * net.sigmoid(net.gate(h.mean((2, 3), keepdim=True))),  # squeeze and excitation
        lambda net, h: h * net.sigmoid(net.gate(h)),
        lambda net, h: torch.sigmoid(h) * torch.sigmoid(-h),
        lambda net, h: h * h + 2 * h,
        lambda net, h: h * h.mean().sigmoid(),
    ],
)
def test_other_products_are_none(function, traced_by):
    assert sites_of(traced_by(Middle(function))) == []


@pytest.mark.parametrize("function", [lambda x: x.clamp(max=0), lambda x: x.clamp(min=0.5), torch.abs])
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
def test_channels_are_last_behind_dense_layers_and_first_behind_convolutions(layers, axis, traced_by):
    (site,) = sites_of(traced_by(nn.Sequential(*layers)))
    assert site.axis == axis


def test_channel_axis_overrides_all_but_dense_activations():
    model = nn.Sequential(nn.Conv2d(3, 7, 1), nn.GELU(), nn.Flatten(), nn.Linear(7 * 256, 5), nn.ReLU())
    assert [site.axis for site in sites_of(model, channel_axis=-1)] == [3, 1]


def test_calls_are_listed_in_the_order_of_execution(traced_by):
    wanted = ["act1", "layer1_0_act1", "layer1_0_act2", "layer2_0_act1", "layer2_0_act2"]
    names = [site.name for site in sites_of(traced_by(ResNet(4, blocks=(1, 1), width=4)))]
    assert [name.replace("network_", "") for name in names] == [f"00{number}_{name}" for number, name in enumerate(wanted)]


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
