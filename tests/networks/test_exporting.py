"""Graphs of torch.export against the network that they were made from: the same bits at every batch size, device-free, and copyable."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.errors import UserError
from marginclip.networks.exporting import aten_name, export_graph, is_exported, plain_graph


class Mixed(nn.Module):
    """Batch norm, in-place activations, a constant, positions made in ``forward``, a view, attention and a check of the size."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 5)
        self.register_buffer("shift", torch.tensor(0.25), persistent=False)

    def forward(self, x):
        height = x.shape[2]
        assert height == 8
        h = self.drop(self.act(self.norm(self.conv(x))))
        tokens = h.contiguous().view(h.size(0), 4, -1).transpose(1, 2)
        tokens = tokens + torch.arange(tokens.shape[1], device=x.device).unsqueeze(1) * self.shift
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return self.head(F.gelu(tokens).mean(1))


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    model = Mixed()
    model.norm.running_mean.uniform_(-0.2, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def graph(mixed):
    return export_graph(copy.deepcopy(mixed), torch.rand(1, 3, 8, 8))


def test_the_same_bits_at_every_batch_size(mixed, graph, images):
    for size in (1, 2, 12):
        assert torch.equal(graph(images[:size]), mixed(images[:size]))


def test_channels_last_is_the_same_up_to_rounding(mixed, graph, images):
    """``contiguous()`` is no operator of a graph whose images were contiguous, so sums can be taken in another order."""
    turned = copy.deepcopy(graph).to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        turned(images.contiguous(memory_format=torch.channels_last)), mixed(images), rtol=1e-5, atol=1e-5
    )


def test_weights_have_the_models_names_and_images_a_gradient(mixed, graph, images):
    names = {name for name in mixed.state_dict() if not name.endswith("num_batches_tracked")}
    assert names <= graph.state_dict().keys()
    wanted, found = (images.clone().requires_grad_() for _ in range(2))
    mixed(wanted).square().sum().backward()
    graph(found).square().sum().backward()
    assert torch.equal(found.grad, wanted.grad)
    assert found.grad.abs().sum() > 0


def test_kernels_are_those_of_the_network(graph):
    names = {aten_name(node) for node in graph.graph.nodes}
    assert {"conv2d", "batch_norm", "relu_", "linear", "gelu", "scaled_dot_product_attention"} <= names
    assert not {name for name in names if name and name.startswith("_assert")}
    assert "view" not in names  # it would refuse what a channels-last network gives


def test_no_device_is_written_into_the_graph(graph, images):
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert not [node for node in nodes for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.device)]
    assert all(isinstance(value, torch.Tensor) for value in graph.state_dict().values())
    moved = copy.deepcopy(graph).to("meta")
    assert moved(images.to("meta")).device.type == "meta"


@pytest.mark.parametrize("way", ["copy", "pickle", "traced again", "exported again"])
def test_copies_give_the_same_bits(graph, images, way):
    if way == "copy":
        again = copy.deepcopy(graph)
    elif way == "pickle":
        file = io.BytesIO()
        torch.save(graph, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    elif way == "traced again":
        again = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), graph))
    else:
        again = export_graph(graph, images)
    assert torch.equal(again(images), graph(images))


def test_other_sizes_are_refused_in_one_sentence(graph):
    with pytest.raises(AssertionError, match=r"^the network was traced for images of 3 x 8 x 8 and takes no others$"):
        graph(torch.rand(2, 3, 9, 8))


class Answers(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Conv2d(3, 2, 8)

    def forward(self, x):
        logits = self.layer(x).flatten(1)
        return {"dictionary": {"features": x, "logits": logits}, "pair": (logits, x), "alone": (logits,)}[self.kind]


def exported(model, *inputs):
    return torch.export.export(model, inputs or (torch.rand(2, 3, 8, 8),), dynamic_shapes=None).module()


def test_logits_are_taken_out_of_what_a_program_gives(images):
    for kind, output in (("dictionary", "logits"), ("alone", None)):
        model = Answers(kind).eval()
        assert torch.equal(plain_graph(exported(model), output=output)(images[:2]), model.layer(images[:2]).flatten(1))
    for kind, output in (("dictionary", None), ("dictionary", "absent"), ("pair", None)):
        with pytest.raises(UserError, match=r"must return one tensor of logits, not a \w+; model.output names the part of"):
            plain_graph(exported(Answers(kind).eval()), output=output)


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return (x + y).flatten(1)


class Regions(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            h = x.relu() + 1
        return (h * x).flatten(1)


def test_programs_that_are_no_classifiers_of_images_are_refused(images):
    with pytest.raises(UserError, match=r"takes 2 inputs, not images alone"):
        plain_graph(exported(TwoInputs(), images[:2], images[:2]))
    with pytest.raises(UserError, match=r"a part of its own behind torch.cond, torch.autocast or torch.no_grad"):
        plain_graph(exported(Regions()))
    assert is_exported(exported(TwoInputs(), images[:2], images[:2]))
    assert not is_exported(Regions())
