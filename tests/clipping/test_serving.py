"""The serving form against the bounded network and the model: the same bits, fewer passes."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.clipping.one_batch import OneBatchPair, in_one_batch
from marginclip.clipping.scaled_bounds import scale_bounds
from marginclip.clipping.serving import Clip, ClippedReLU, NetworkPair, PairedNetwork, ServedNetwork, paired
from marginclip.models import ResNet


class Odd(nn.Module):
    """What can go wrong in one network: sums in place, an activation called twice, one with two sides, a function, a method."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(size, 6, 3, padding=1) for size in (3, 6, 6))
        self.norm, self.act, self.two_sided = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True)
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        early = self.act(self.norm(self.first(x)))
        deep = F.relu(self.second(early))
        deep += early
        deep = self.two_sided(deep)
        late = self.act(self.third(deep))
        late += deep
        late = late.mul_(0.5)
        return self.last(late.mean((2, 3)).relu())


def networks():
    torch.manual_seed(0)
    yield "resnet", ResNet(5, blocks=(1, 1), width=6)
    yield "odd", Odd()
    yield "gelu", nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU6(), nn.Linear(8, 5))


@pytest.fixture(params=["resnet", "odd", "gelu"])
def model(request):
    return dict(networks())[request.param].eval()


@pytest.fixture
def images():
    return torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def bounded(model, images, *, wide=0, **settings):
    """The model with bounds at half of the maxima; the first ``wide`` are infinite."""
    network = BoundedNetwork(model, images[:1], **settings)
    network.set_from_images(images, share=0.5)
    for _, bound in list(network.each())[:wide]:
        with torch.no_grad():
            for value, limit in zip(bound.values(), (float("inf"), float("-inf")), strict=False):
                value.fill_(limit)
    return network


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("wide", [0, 1, 2])
@torch.no_grad()
def test_both_logits_are_those_of_the_networks_to_the_bit(model, images, wide, fused):
    network = bounded(model, images, wide=wide)
    wanted, wanted_bounded = model(images), network(images)
    assert torch.equal(wanted, wanted_bounded) == (wide >= len(network.bounds))
    assert torch.equal(ServedNetwork(network, fused=fused)(images), wanted_bounded)
    pair = paired(model, network, fused=fused)
    assert isinstance(pair, PairedNetwork)
    for _ in range(2):
        logits, bounded_logits = pair(images)
        assert torch.equal(logits, wanted)
        assert torch.equal(bounded_logits, wanted_bounded)
    assert torch.equal(network(images), wanted_bounded)
    assert torch.equal(model(images), wanted)


@torch.no_grad()
def test_what_lies_before_the_first_cut_is_computed_once(images):
    model = ResNet(5, blocks=(1, 1), width=6).eval()
    shares = []
    for wide in range(6):
        pair = paired(model, bounded(model, images, wide=wide))
        called = [pair.network.get_submodule(n.target) for n in pair.network.graph.nodes if n.op == "call_module"]
        convolutions = [module for module in called if isinstance(module, nn.Conv2d)]
        shares.append((len(convolutions), pair.shared))
    counts, shared = zip(*shares, strict=True)
    single = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert counts[0] == 2 * single - 1  # all but the stem
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[-1] == single
    assert list(shared) == sorted(shared)
    assert shared[-1] == 1


class Twice(nn.Module):
    """A convolution that is called twice, each time with a batch norm of its own behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.last = nn.Linear(3, 5)

    def forward(self, x):
        x = F.relu(self.second(self.conv(F.relu(self.first(self.conv(x))))))
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "left"), [(lambda: ResNet(5, blocks=(1, 1), width=6), 0), (Twice, 2)], ids=["resnet", "twice"]
)
@torch.no_grad()
def test_batch_norms_are_folded_where_that_is_the_same(make, left, images, settle):
    model = settle(make())
    network = bounded(model, images)
    pair, served = paired(model, network, folded=True), ServedNetwork(network, folded=True)
    logits, bounded_logits = pair(images)
    torch.testing.assert_close(logits, model(images), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bounded_logits, network(images), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(served(images), network(images), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, bounded_logits, atol=1e-2)
    for made in (pair.network, served.network):
        assert sum(isinstance(module, nn.BatchNorm2d) for module in made.modules()) == left


@torch.no_grad()
def test_relu_and_bound_in_one_pass_are_the_bound_behind_the_relu():
    network = BoundedNetwork(
        nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), torch.rand(1, 1, 1, 2)
    )
    (_, bound), *_ = network.each()
    bound.upper.copy_(torch.tensor([0.0, 0.5, float("inf"), -0.25]))
    x = torch.tensor([-2.0, -0.0, 0.0, 0.3, 0.5, 0.7, float("inf"), float("-inf"), float("nan")])
    x = x.view(-1, 1, 1, 1).expand(-1, 4, 1, 2)
    wanted = bound(F.relu(x))
    torch.testing.assert_close(ClippedReLU(bound)(x), wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(Clip(bound)(F.relu(x)), wanted, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_offsets_stay_behind_the_bounded_logits_alone(images):
    model = ResNet(5, blocks=(1, 1), width=6).eval()
    network = bounded(model, images, offsets=True, scaled=True)
    network.offsets.load({"offsets": torch.arange(5.0), "scale": torch.tensor([2.0])})
    logits, bounded_logits = paired(model, network)(images)
    assert torch.equal(logits, model(images))
    assert torch.equal(bounded_logits, network(images))


@torch.no_grad()
def test_other_weights_are_computed_in_full(images):
    model = ResNet(5, blocks=(1, 1), width=6).eval()
    other = copy.deepcopy(model)
    other.get_submodule("conv1").weight.mul_(1.01)
    for repaired in (bounded(other, images), other):
        pair = paired(model, repaired)
        assert isinstance(pair, NetworkPair)
        logits, bounded_logits = pair(images)
        assert torch.equal(logits, model(images))
        assert torch.equal(bounded_logits, repaired(images))


def test_nothing_is_shared_with_what_was_given(images):
    model = ResNet(5, blocks=(1, 1), width=6).eval()
    network = bounded(model, images)
    pair = paired(model, network)
    with torch.no_grad():
        before = pair(images)[1]
        network.set_constant(0.01)
        network.network.get_submodule("conv1").weight.zero_()
        assert torch.equal(pair(images)[1], before)


class SizesOfTheBatch(nn.Module):
    """Reshapes by the size of the batch that came in, which is not that of two batches in one."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)

    def forward(self, images):
        return self.last(F.relu(self.conv(images)).reshape(images.shape[0], -1))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("wide", [0, 1, 2, 9])
@torch.no_grad()
def test_one_batch_of_both_gives_the_logits_of_both(model, images, wide, count, settle):
    model = settle(model)
    network = bounded(model, images, wide=wide)
    pair = in_one_batch(network, images[:count])
    assert isinstance(pair, OneBatchPair)
    logits, bounded_logits = pair(images[-count:])
    torch.testing.assert_close(logits, model(images[-count:]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bounded_logits, network(images[-count:]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_batch_keeps_offsets_for_the_bounded_logits(images):
    model = ResNet(5, blocks=(1, 1), width=6).eval()
    network = bounded(model, images, offsets=True)
    network.offsets.load({"offsets": torch.arange(5.0)})
    logits, bounded_logits = in_one_batch(network, images)(images)
    torch.testing.assert_close(logits, model(images), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bounded_logits, network(images), atol=1e-4, rtol=1e-4)


def test_a_network_that_counts_its_images_is_not_put_into_one_batch(images):
    assert in_one_batch(bounded(SizesOfTheBatch().eval(), images), images) is None


class Branching(nn.Module):
    """Bounded maps that a convolution alone reads, that a sum reads too, of grouped layers, and of one called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.strided, self.again = nn.Conv2d(6, 6, 3, padding=1, stride=2, bias=False), nn.Conv2d(6, 6, 1)
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.grouped(x)) + x
        x = F.relu(self.strided(x))
        x = F.relu(self.again(x))
        x = F.relu(self.again(x)).mean((2, 3))
        return self.last(F.relu(x))


@pytest.mark.parametrize(
    ("make", "scaled", "new_layers"),
    [(lambda: ResNet(5, blocks=(1, 1), width=6), 5, 4), (Branching, 5, 7), (lambda: dict(networks())["gelu"], 0, 0)],
    ids=["resnet", "branching", "gelu"],
)
@torch.no_grad()
def test_scaled_bounds_give_the_same_logits(make, scaled, new_layers, images, settle):
    model = settle(make())
    network = bounded(model, images)
    (_, first), *_ = network.each()
    first.upper[0] = 0  # a map that is off
    served = ServedNetwork(network, fused=False, folded=True)
    count = sum(isinstance(module, nn.Conv2d) for module in served.modules())
    before = served(images)
    assert not torch.allclose(before, model(images), atol=1e-2)
    assert scale_bounds(served.network) == scaled
    torch.testing.assert_close(served(images), before, atol=1e-5, rtol=1e-5)
    assert sum(isinstance(module, nn.Conv2d) for module in served.modules()) - count == new_layers
    torch.testing.assert_close(network(images), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [float("inf"), -0.5])
@torch.no_grad()
def test_bounds_that_no_scale_can_stand_for_stay(images, value):
    network = BoundedNetwork(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)), images[:1])
    ((_, bound),) = network.each()
    bound.upper.copy_(torch.tensor([0.1, 0.2, 0.3, value]))
    served = ServedNetwork(network, fused=False)
    assert scale_bounds(served.network) == 0
    assert torch.equal(served(images), network(images))


class Written(nn.Module):
    """Writes into a tensor that both halves of a pair have in common, behind its activation."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, images):
        x = self.first(images)
        x = self.write(x, self.second(F.relu(x)))
        return self.last(x.mean((2, 3)))


def add_without_a_name(x, y):
    x.add_(y)
    return x


def add_to_a_view(x, y):
    x.view(-1, 6, 36).add_(y.flatten(2))
    return x


def add_and_keep(x, y):
    kept = x
    x += y
    return x + kept


@pytest.mark.parametrize(
    "write",
    [operator.iadd, operator.itruediv, lambda x, y: x.add_(y), add_without_a_name, add_to_a_view, add_and_keep],
)
def test_what_is_written_in_place_behind_a_bound_is_seen_by_one_half_alone(write, traced_by, images):
    model = traced_by(Written(write).eval())
    network = bounded(model, images)
    pair = paired(model, network)
    with torch.no_grad():
        logits, bounded_logits = pair(images)
        torch.testing.assert_close(logits, model(images))
        torch.testing.assert_close(bounded_logits, network(images))
        assert not torch.equal(logits, bounded_logits)


def test_weights_that_are_computed_at_each_call_are_not_scaled(images):
    torch.manual_seed(0)
    first, second = (nn.utils.parametrizations.weight_norm(nn.Conv2d(size, 6, 3)) for size in (3, 6))
    network = bounded(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)).eval(), images)
    served = ServedNetwork(network, fused=False)
    assert scale_bounds(served.network) == 2
    torch.testing.assert_close(served(images), network(images))
