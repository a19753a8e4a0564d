"""BoundedNetwork against the model itself, hooks, closed forms and central differences."""

import copy
import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from marginclip.clipping import BoundedNetwork, activation_extremes
from marginclip.errors import UserError
from marginclip.maxmargin.margin import margin
from marginclip.maxmargin.objectives import mmac
from marginclip.models import ResNet
from marginclip.networks.copies import frozen_copy


class Written(nn.Module):
    """A network whose middle is a given function of (self, conv output); 4 channels, 3 classes."""

    def __init__(self, middle):
        super().__init__()
        self.conv, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.relu, self.inplace, self.prelu = nn.ReLU(), nn.ReLU(inplace=True), nn.PReLU(4)
        self.middle = middle

    def forward(self, x):
        return self.head(self.middle(self, self.conv(x)).mean((2, 3)))


def overwritten_then_read(self, x):
    before = x * 2
    F.relu_(x)
    return self.second(x) + before + x


def residual_in_place(self, x):
    out = self.inplace(x)
    out = self.second(out)
    out += x
    return self.inplace(out)


# Name: (middle, calls of an activation, whether they are two-sided)
SPELLINGS = {
    "module": (lambda self, x: self.relu(x), 1, False),
    "reused module": (lambda self, x: self.relu(self.second(self.relu(x))), 2, False),
    "in-place module": (lambda self, x: self.inplace(self.second(self.inplace(x))), 2, False),
    "residual in place": (residual_in_place, 2, False),
    "function": (lambda self, x: F.relu(torch.relu(x) - 0.1), 2, False),
    "function, in-place flag": (lambda self, x: F.relu(x, inplace=True) + F.relu(self.second(x), True), 2, False),
    "method": (lambda self, x: self.second(x.relu()).relu_(), 2, False),
    "overwritten then read": (overwritten_then_read, 1, False),
    "clamp": (lambda self, x: torch.clamp(self.second(x.clamp(min=0)), 0) + x.clamp_min(0), 3, False),
    "in-place clamp": (lambda self, x: self.second(x.clamp_(min=0)) + x, 1, False),
    "relu6": (lambda self, x: F.relu6(x), 1, False),
    "leaky_relu": (lambda self, x: F.leaky_relu(self.second(F.leaky_relu_(x, 0.1)), 0.1, True) + x, 2, True),
    "gelu and silu": (lambda self, x: F.silu(self.second(F.gelu(x)), inplace=True), 2, True),
    "prelu": (lambda self, x: self.prelu(x), 1, True),
}


def digest(module):
    """A hash of every parameter and buffer of a module but its bounds, by name."""
    state = [(name, value.tolist()) for name, value in module.state_dict().items() if "bound" not in name]
    return hashlib.sha256(repr(state).encode()).hexdigest()


@pytest.fixture
def given(net, traced_by):
    """The small network, for each of the tracers."""
    return traced_by(net)


@pytest.fixture
def bounded(given, images):
    return BoundedNetwork(given, images[0])


@pytest.mark.parametrize("name", SPELLINGS)
def test_infinite_bounds_leave_every_bit(name, settle, images, traced_by):
    middle, calls, two_sided = SPELLINGS[name]
    model = traced_by(settle(Written(middle)))
    bounded = BoundedNetwork(model, images[0])
    for size in (1, 2, 12):
        assert torch.equal(bounded(images[:size]), model(images[:size].clone()))
    assert [bound.lower is not None for _, bound in bounded.each()] == [two_sided] * calls
    assert bounded.num_bounds == calls * 4 * (1 + two_sided)


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_call_is_clipped_by_its_own_bounds(name, settle, images, traced_by):
    """Closing one call changes the logits, so every bound is really in the way of what follows."""
    bounded = BoundedNetwork(traced_by(settle(Written(SPELLINGS[name][0]))), images[0])
    free = bounded(images)
    for _, bound in bounded.each():
        bound.upper.data.fill_(0.01)
        assert not torch.equal(bounded(images), free)
        bound.upper.data.fill_(float("inf"))


def test_bound_cuts_as_a_loop_over_values_would(images):
    bounded = BoundedNetwork(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(0.5)), images[0])
    ((_, bound),) = bounded.each()
    bounded.requires_grad_(False)
    x = torch.randn(5, 4, 3, 3)
    bound.upper.data, bound.lower.data = torch.tensor([0.5, 1.0, 0.0, 2.0]), torch.tensor([-0.1, -2.0, 0.0, -1.0])
    expected = x.clone()
    for index in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        channel = index[1]
        expected[tuple(index)] = min(max(float(x[tuple(index)]), float(bound.lower[channel])), float(bound.upper[channel]))
    assert torch.equal(bound(x), expected)


def test_zero_bounds_give_the_bias_of_the_last_layer(net, bounded, images):
    for value in bounded.bound_parameters():
        value.data.zero_()
    assert torch.equal(bounded(images), net[-1].bias.expand(len(images), -1))


def test_raising_a_bound_never_lowers_an_activation(bounded):
    x = torch.randn(6, 5, 4, 4).relu()
    (_, bound), _ = bounded.each()
    low, high = bound.upper.data.uniform_(0, 1).clone(), torch.rand(5)
    clipped = bound(x)
    bound.upper.data.copy_(low + high)
    assert (bound(x) >= clipped).all()
    assert (bound(x) > clipped).any()


def test_the_papers_resnet18_has_3904_bounds_behind_17_calls():
    bounded = BoundedNetwork(ResNet(10), torch.rand(3, 32, 32))
    assert (bounded.num_bounds, len(list(bounded.each()))) == (3904, 17)
    assert not any("linear" in name for name, _ in bounded.each())


def test_dense_layers_have_one_bound_a_neuron(traced_by):
    model = traced_by(nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 2)))
    bounded = BoundedNetwork(model, torch.rand(3, 2, 2))
    assert bounded.num_bounds == 7


def test_maps_kept_channels_last_are_bounded_on_their_last_axis(settle, traced_by):
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mlp, self.head = nn.Conv2d(3, 6, 2, stride=2), nn.Linear(6, 10), nn.Linear(10, 2)
            self.norm, self.act = nn.LayerNorm(6), nn.GELU()

        def forward(self, x):
            return self.head(self.act(self.mlp(self.norm(self.stem(x).permute(0, 2, 3, 1)))).mean((1, 2)))

    model, images = traced_by(settle(ChannelsLast())), torch.rand(2, 3, 8, 8)
    bounded = BoundedNetwork(model, images)
    ((_, bound),) = bounded.each()
    assert (bound.axis, bound.upper.shape, bounded.num_bounds) == (3, (10,), 20)
    assert torch.equal(bounded(images), model(images))
    assert BoundedNetwork(model, images, channel_axis=1).num_bounds == 2 * 4  # asked for: the first of the two pixel axes


def total_loss(bounded, images, free, starts, classes):
    return mmac(bounded(images), free, margin(bounded(starts), classes), 0.7).loss


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_gradient_of_the_loss_equals_central_differences(activation, settle, traced_by):
    """mmac computes in float32, so the same loss is written out here in float64."""
    layers = nn.Conv2d(3, 4, 3), activation(), nn.Flatten(), nn.Linear(16, 5), activation(), nn.Linear(5, 3)
    model = traced_by(settle(nn.Sequential(*layers)).double())
    images, starts = torch.rand(6, 3, 4, 4).double(), torch.rand(9, 3, 4, 4).double()
    free = model(images).detach()
    bounded, classes = BoundedNetwork(model, images[0]).double(), torch.arange(9) % 3
    bounded.set_constant(0.3)

    def loss():
        return F.mse_loss(bounded(images), free) + 0.7 * margin(bounded(starts), classes).mean()

    before = digest(bounded.network)
    loss().backward()
    step = 1e-6
    for value in bounded.bound_parameters():
        for index in range(len(value)):
            with torch.no_grad():
                value[index] += step
                above = loss()
                value[index] -= 2 * step
                below = loss()
                value[index] += step
            assert value.grad[index].item() == pytest.approx(((above - below) / (2 * step)).item(), abs=1e-5)
    assert any(value.grad.abs().sum() > 0 for value in bounded.bound_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert digest(bounded.network) == before


def test_learning_bounds_leaves_the_weights_and_the_given_model(net, images):
    net.train()
    net[1].eval()
    modes, before = [module.training for module in net.modules()], digest(net)
    bounded = BoundedNetwork(net, images[0])
    weights = digest(bounded)
    bounded.set_from_images(images, share=0.5)
    start = bounded.bounds_state()
    optimizer = torch.optim.Adam(bounded.bound_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        total_loss(bounded.train(), images, torch.zeros(12, 4), images, torch.arange(12) % 4).backward()
        optimizer.step()
    assert digest(bounded) == weights
    assert not any(torch.equal(start[name], value) for name, value in bounded.bounds_state().items())
    assert digest(net) == before
    assert [module.training for module in net.modules()] == modes
    assert all(module.inplace for module in net.modules() if isinstance(module, nn.ReLU))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    own, given = ({value.untyped_storage().data_ptr() for value in module.state_dict().values()} for module in (bounded, net))
    assert not own & given


def test_only_bounds_can_learn_and_it_stays_in_evaluation_mode(bounded):
    learnable = {id(parameter) for parameter in bounded.parameters() if parameter.requires_grad}
    assert learnable == {id(value) for value in bounded.bound_parameters()}
    assert not any(module.training for module in bounded.train().modules())


def test_the_gradient_reaches_a_bound_only_from_what_it_cuts(bounded, images):
    """At the clean maxima nothing is cut, ties included: the data term and every gradient are exactly zero."""
    bounded.set_from_images(images)
    with bounded.unbounded():
        free = bounded(images)
    objective = mmac(bounded(images), free.detach(), torch.zeros(1), 0.0)
    objective.loss.backward()
    bounded(images).sum().backward()
    assert objective.data == 0
    assert torch.equal(bounded(images), free)
    assert all(value.grad.eq(0).all() for value in bounded.bound_parameters())


def test_logits_do_not_depend_on_the_batch(bounded, images):
    bounded.set_constant(0.3)
    one_by_one = torch.cat([bounded(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(bounded(images), one_by_one)


def test_extremes_equal_those_of_hooks(net, bounded, images):
    seen = []
    for layer in (net[2], net[4]):
        layer.register_forward_hook(lambda *call: seen.append(call[2].detach().clone()))
    for image in images:
        net(image.unsqueeze(0))
    bounded.set_constant(0.01)  # extremes are the unbounded network's, whatever the bounds
    extremes = list(activation_extremes(bounded, images, batch_size=5).values())
    for site in range(2):
        for number, maps in enumerate(seen[site::2]):
            torch.testing.assert_close(extremes[site][0][number], maps[0].amin((1, 2)))
            torch.testing.assert_close(extremes[site][1][number], maps[0].amax((1, 2)))
    assert bounded.active_share(activation_extremes(bounded, images)) == pytest.approx(
        sum(int((high.amax(0) > 0.01).sum()) for _, high in extremes) / 11
    )


@pytest.mark.parametrize(("share", "quantile"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8)])
def test_bounds_from_images_by_hand(share, quantile, settle, images):
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 5, 3), nn.ReLU()))
    bounded = BoundedNetwork(model, images[0])
    bounded.set_constant(0.5)
    bounded.set_from_images(images, share=share, quantile=quantile, batch_size=5)
    first, second = (bound for _, bound in bounded.each())
    with torch.no_grad():
        leaky = model[:2](images).flatten(2)
        expected = [leaky.amax(2), -leaky.amin(2), model(images).flatten(2).amax(2)]
    for value, reached in zip((first.upper, -first.lower, second.upper), expected, strict=True):
        by_numpy = torch.tensor([float(column.sort().values.numpy()[-1]) for column in reached.T])
        if quantile < 1:
            position = quantile * (len(images) - 1)
            ranked, floor = reached.sort(0).values, int(position)
            by_numpy = ranked[floor] + (position - floor) * (ranked[floor + 1] - ranked[floor])
        torch.testing.assert_close(value.detach(), share * by_numpy)


def test_projection_keeps_bounds_sensible(settle, images):
    bounded = BoundedNetwork(settle(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.GELU())), images[0])
    one, two = (bound for _, bound in bounded.each())
    one.upper.data = torch.tensor([-0.5, 0.5])
    two.upper.data, two.lower.data = torch.tensor([-1.0, 2.0]), torch.tensor([0.5, -0.5])
    bounded.project_()
    assert one.upper.tolist() == [0.0, 0.5]
    assert (two.upper.tolist(), two.lower.tolist()) == ([-1.0, 2.0], [-1.0, -0.5])


def test_state_dict_and_bounds_state_survive(given, bounded, images, tmp_path):
    bounded.set_from_images(images, share=0.5)
    other, only_bounds = BoundedNetwork(copy.deepcopy(given), images[0]), BoundedNetwork(given, images[0])
    torch.save(bounded.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    only_bounds.load_bounds(bounded.bounds_state())
    for restored in (other, only_bounds):
        assert torch.equal(restored(images), bounded(images))
    assert any(name.startswith("bounds.") for name in bounded.state_dict())
    state = bounded.bounds_state()
    bounded.set_constant(2)
    assert not any(value.eq(2).any() for value in state.values())  # copies


@pytest.mark.parametrize("make", [copy.deepcopy, BoundedNetwork.fused])
def test_copies_use_the_bounds_that_they_show(make, bounded, images):
    twin = make(bounded)
    free = twin(images).detach()
    twin.set_constant(0.1)
    assert not torch.allclose(twin(images), free)
    for name, bound in twin.each():
        assert twin.network.get_submodule(f"bound_{name}") is bound


def test_a_deep_copy_is_independent(bounded, images):
    bounded.set_constant(0.2)
    twin, before = copy.deepcopy(bounded), bounded(images)
    twin.set_constant(0.1)
    assert torch.equal(bounded(images), before)
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in bounded.parameters())


def shared_block(self, x):
    return self.relu(self.bn(self.second(self.relu(self.bn(self.second(x))))))


@pytest.mark.parametrize("kind", ["net", "resnet", "shared block", "no batch norm"])
def test_fused_equals_and_shares_its_bounds(kind, net, settle, images):
    shared = Written(shared_block)
    shared.bn = nn.BatchNorm2d(4)
    models = {"net": net, "resnet": ResNet(4, blocks=(1, 1), width=4), "shared block": shared}
    models["no batch norm"] = Written(SPELLINGS["module"][0])
    bounded = BoundedNetwork(settle(models[kind]), images[0])
    bounded.set_from_images(images, share=0.6)
    before = digest(bounded)
    fused = bounded.fused()
    torch.testing.assert_close(fused(images), bounded(images), atol=1e-5, rtol=1e-5)
    if kind in ("net", "resnet"):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.network.modules())
    assert digest(bounded) == before
    assert {id(v) for v in fused.bound_parameters()} == {id(v) for v in bounded.bound_parameters()}
    assert {id(p) for p in fused.parameters() if p.requires_grad} == {id(v) for v in bounded.bound_parameters()}
    fused.set_constant(0.05)
    torch.testing.assert_close(fused(images), bounded(images), atol=1e-5, rtol=1e-5)


def test_unbounded_is_the_model_inside_only(net, bounded, images):
    bounded.set_constant(0.01)
    clipped = bounded(images)
    with bounded.unbounded():
        assert torch.equal(bounded(images), net(images))
    with pytest.raises((RuntimeError, AssertionError)), bounded.unbounded():
        bounded(images[:, :1])
    assert torch.equal(bounded(images), clipped)


def read_through_a_view(self, x):
    before = x.view_as(x)
    return self.inplace(x) + before


class Pair(nn.Module):
    def forward(self, x):
        return x.relu(), x


class Packed(nn.Identity):
    """What stands in the place of a layer in a quantised network."""


Packed.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"


class Branching(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum() > 0 else x


class Tokens(nn.Module):
    def forward(self, x):
        return x[..., :8]


class Encoder(nn.Module):
    def __init__(self, activation, layers=0):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
        self.layer, self.relu = layer, nn.ReLU()
        if layers:
            self.layer = nn.TransformerEncoder(self.layer, layers, enable_nested_tensor=False)

    def forward(self, x):
        return self.relu(self.layer(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branching(), r"Branching cannot be traced by torch.fx \(.*\) nor by torch.export \(.*\); .*torch.fx.wrap"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "no activation functions that could be bounded"),
        (Written(lambda self, x: (x + torch.rand_like(x)).relu()), "must not draw random numbers"),
        (nn.DataParallel(Pair()), "wrapped in DataParallel: give the network inside, model.module"),
        (torch.jit.script(nn.Sequential(nn.ReLU())), "TorchScript model, or one with such a part, cannot be traced"),
        (
            torch.export.export(nn.Sequential(nn.ReLU()), (torch.rand(1, 3, 8, 8),)),
            r"is an exported program: give marginclip.models.from_program\(program\)",
        ),
        (nn.Sequential(Packed(), nn.ReLU()), "model is quantised: give the network in full precision"),
        (torch.relu, "must be a torch.nn.Module, got builtin_function_or_method"),
        (Pair(), "one tensor of logits, not a tuple"),
        (Written(read_through_a_view), "overwrites an activation's input in place.*write that activation out of place"),
    ],
    ids=[
        "branching",
        "linear",
        "random",
        "parallel",
        "scripted",
        "exported",
        "quantised",
        "function",
        "pair",
        "aliased",
    ],
)
def test_models_that_cannot_be_bounded_are_refused_with_a_way_out(model, message, images):
    with pytest.raises(UserError, match=message):
        BoundedNetwork(model, images[0])


@pytest.mark.parametrize(
    ("activation", "layers", "sides"), [(nn.ReLU(), 0, [1, 1]), ("relu", 0, [1, 1]), ("gelu", 2, [2, 2, 1])]
)
def test_activations_inside_fused_layers_of_torch_are_found(activation, layers, sides, images):
    """torch.fx does not look into them; torch.export does."""
    model = nn.Sequential(nn.Flatten(2), Tokens(), Encoder(activation, layers), nn.Flatten(), nn.Linear(24, 2)).eval()
    bounded = BoundedNetwork(model, images[0])
    assert torch.equal(bounded(images), model(images))
    assert [1 + (bound.lower is not None) for _, bound in bounded.each()] == sides
    assert [bound.axis for _, bound in bounded.each()] == [2] * len(sides)
    assert [len(bound.upper) for _, bound in bounded.each()] == [16] * (len(sides) - 1) + [8]


@pytest.mark.parametrize("axis", [0, 4, -4, -5])
def test_a_channel_axis_that_is_none_is_refused(axis, net, images):
    with pytest.raises(UserError, match="channel_axis"):
        BoundedNetwork(net, images[0], channel_axis=axis)


def test_bounds_fit_the_network_inside_a_wrapper_and_the_other_way_round(net, images):
    bounded = BoundedNetwork(net, images[0])

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = net

        def forward(self, x):
            return self.network(x)

    bounded.set_from_images(images, share=0.5)
    wrapped = BoundedNetwork(Wrapper(), images[0])
    assert wrapped.bounds_state().keys() != bounded.bounds_state().keys()
    wrapped.load_bounds(bounded.bounds_state())
    assert torch.equal(wrapped(images), bounded(images))
    again = BoundedNetwork(net, images[0])
    again.load_bounds(wrapped.bounds_state())
    assert torch.equal(again(images), bounded(images))


def test_bounds_of_another_architecture_are_refused(bounded, settle, images):
    state = bounded.bounds_state()
    wider = {name: torch.ones(9) for name in state}
    for odd in (wider, dict(list(state.items())[:1]), state | {"009_x.upper": torch.ones(1)}):
        with pytest.raises(UserError, match="another architecture"):
            bounded.load_bounds(odd)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, x: b.set_constant(0), "initial bound must be positive"),
        (lambda b, x: b.set_from_images(x, share=0), "share"),
        (lambda b, x: b.set_from_images(x, quantile=0), "quantile"),
        (lambda b, x: b.set_from_images(x, quantile=1.1), "quantile"),
    ],
)
def test_bad_settings_are_refused(call, message, bounded, images):
    with pytest.raises(UserError, match=message):
        call(bounded, images)


# -- a graph that is not the model's ------------------------------------------------------------------------------------------


class Optional(nn.Module):
    """Prepares its images unless told otherwise; torch.fx takes the argument that is left out for one that is given."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

    def forward(self, images, normalised=None):
        if normalised is None:
            images = (images - 0.3) / 0.1
        return self.layers(images)


def test_a_branch_on_an_argument_that_is_left_out_is_the_models_own():
    model, images = Optional().eval(), torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(BoundedNetwork(model, images)(images), model(images))
    frozen = frozen_copy(model, images[:1])
    torch.testing.assert_close(frozen(images), model(images))


def test_a_hook_on_the_model_itself_is_not_lost_in_silence():
    model, images = Optional().layers.eval(), torch.rand(4, 3, 8, 8)
    model.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - 0.3) / 0.1,))
    for network in (BoundedNetwork(model, images), frozen_copy(model, images[:1])):
        torch.testing.assert_close(network(images), model(images))


class Watchful(nn.Module):
    """Gives other logits while it is traced, by either tracer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

    def forward(self, images):
        traced = torch.compiler.is_compiling() or isinstance(images, fx.Proxy)
        return self.layers(images) * (1 if traced else 2)


def test_a_graph_that_gives_other_logits_than_the_model_is_refused():
    with pytest.raises(UserError, match="the traced network gives other logits than the model, as where a hook"):
        BoundedNetwork(Watchful().eval(), torch.rand(4, 3, 8, 8))


class NormalisedTokens(nn.Module):
    """A batch norm over the tokens behind a dense layer over the features: as many of the ones as of the others."""

    def __init__(self):
        super().__init__()
        self.first, self.dense, self.norm, self.last = (
            nn.Conv2d(3, 6, 3),
            nn.Linear(36, 36),
            nn.BatchNorm1d(36),
            nn.Linear(36, 5),
        )
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, images):
        maps = F.relu(self.first(images)).flatten(2)[:, :1].expand(-1, 36, -1)
        return self.last(F.relu(self.norm(self.dense(maps))).mean(1))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("old", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_batch_norms_are_folded_where_that_is_exact_alone(old):
    torch.manual_seed(0)
    images = torch.rand(4, 3, 8, 8)
    computed = nn.Sequential(old(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    with torch.no_grad():
        computed(images)  # else it keeps a tensor with its gradient
    for model in (NormalisedTokens().eval(), computed):
        with torch.no_grad():
            for network in (BoundedNetwork(model, images).fused(), frozen_copy(model, images[:1])):
                torch.testing.assert_close(network(images), model(images), rtol=1e-4, atol=1e-4)


class Squeezed(nn.Module):
    """Right for every batch of more than one image."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, images):
        return self.last(F.adaptive_avg_pool2d(F.relu(self.first(images)), 1).squeeze())


def test_a_model_for_more_than_one_image_can_be_bounded():
    model, images = Squeezed().eval(), torch.rand(4, 3, 8, 8)
    assert torch.equal(BoundedNetwork(model, images)(images), model(images))


class SharedInPlace(nn.Module):
    """Pre-activation blocks: what a shared in-place ReLU overwrote is read again, twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.relu = nn.ReLU(inplace=True)
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 5)

    def forward(self, images):
        stem = self.stem(images)
        inner = self.first(self.relu(stem))
        whole = self.second(self.relu(inner)) + inner + stem
        return self.last(self.relu(whole).mean((2, 3)))


@pytest.mark.parametrize("sites", ["all", "last", "first_half"])
def test_shared_in_place_module_is_made_out_of_place_for_all_its_calls(sites):
    model, images = SharedInPlace().eval(), torch.rand(4, 3, 5, 5)
    assert torch.equal(BoundedNetwork(model, images, sites=sites)(images), model(images))
