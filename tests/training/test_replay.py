"""Replaying passes: what is captured, what goes through the model itself, and that capturing leaves no trace."""

import copy
import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from marginclip.silence import silent_trainer
from marginclip.training import ClassifierTraining, CudaGraphs
from marginclip.training.replay import ReplayedNetwork


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def captured(monkeypatch):
    """Captures on the CPU: warms up like torch does, and counts replays instead of replaying."""
    replays = []

    def make_graphed_callables(call, arguments):
        for _ in range(3):
            torch.autograd.grad(call(*arguments).sum(), list(call.parameters()))

        def replay(images):
            replays.append(len(images))
            return call(images)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(ReplayedNetwork, "replayable", staticmethod(lambda images: torch.is_grad_enabled()))
    return replays


def images(count, seed=0):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def step(network):
    network(images(6)).sum().backward()
    network.passed_back()


def test_on_the_cpu_nothing_is_captured(model):
    network = ReplayedNetwork(model)
    torch.testing.assert_close(network(images(6)), model(images(6)), rtol=0, atol=0)
    assert network.replayed is None


def test_full_batches_are_replayed_and_others_are_not(model, captured):
    network = ReplayedNetwork(model)
    for count in (6, 6, 4, 6):
        network(images(count)).sum().backward()
        network.passed_back()
    assert captured == [6, 6, 6]


def test_capturing_leaves_statistics_and_gradients_as_they_were(model, captured):
    network = ReplayedNetwork(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[1].weight.grad = torch.ones_like(model[1].weight)
    network.capture(images(6))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))
    assert model[4].weight.grad is None


def test_a_second_call_before_the_backward_pass_is_not_replayed(model, captured):
    network = ReplayedNetwork(model)
    loss = network(images(6)).sum() + network(images(6, seed=1)).sum()
    loss.backward()
    assert captured == [6]
    network.passed_back()
    step(network)
    assert captured == [6, 6]


def test_without_gradients_nothing_is_replayed(model, captured):
    network = ReplayedNetwork(model)
    step(network)
    with torch.no_grad():
        network(images(6))
    assert captured == [6]


def test_in_another_mode_nothing_is_replayed(model, captured):
    network = ReplayedNetwork(model)
    step(network)
    model[2].eval()
    step(network)
    model[2].train()
    step(network)
    assert captured == [6, 6]


def test_a_model_that_cannot_be_captured_is_used_as_it_is(model, captured, monkeypatch, caplog):
    def refuse(call, arguments):
        call(*arguments)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    network = ReplayedNetwork(model)
    with caplog.at_level(logging.WARNING):
        step(network)
        step(network)
    assert len(caplog.records) == 1 and "trainer.cuda_graphs=false" in caplog.text
    assert int(model[2].num_batches_tracked) == 2


def trained(model, batches, *callbacks, **settings):
    module = ClassifierTraining(model, optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer = silent_trainer(2, accelerator="cpu", callbacks=list(callbacks), **settings)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert module.forward_pass == module.forward
    return model.state_dict()


def test_training_replays_every_full_batch_and_learns_the_same(model, captured):
    batches = [{"images": images(count, seed), "labels": torch.arange(count) % 3} for seed, count in enumerate((6, 6, 4))]
    plain = trained(copy.deepcopy(model), batches)
    assert captured == []
    replayed = trained(model, batches, CudaGraphs())
    assert captured == [6] * 4
    for name, value in plain.items():
        torch.testing.assert_close(replayed[name], value, rtol=0, atol=0)


def test_accumulated_gradients_are_not_replayed(model, captured):
    batches = [{"images": images(6, seed), "labels": torch.arange(6) % 3} for seed in range(2)]
    trained(model, batches, CudaGraphs(), accumulate_grad_batches=2)
    assert captured == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("half", [False, True])
def test_on_a_gpu_replayed_training_is_the_launched_one(half):
    """Weights, statistics and their counts after some steps, a batch of another size among them."""

    def train(enabled):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)]
        model = nn.Sequential(*layers).cuda()
        network = ReplayedNetwork(model) if enabled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for seed, count in enumerate((6, 6, 4, 6, 6)):
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                loss = nn.functional.cross_entropy(network(images(count, seed).cuda()), torch.arange(count).cuda() % 3)
            optimizer.zero_grad()
            loss.backward()
            if enabled:
                network.passed_back()
            optimizer.step()
        assert not enabled or network.replayed is not None
        return model.state_dict()

    replayed, launched = train(True), train(False)
    for name, value in launched.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-2 if half else 1e-4, atol=1e-2 if half else 1e-5)


def reads_a_number(logits):
    return logits if logits.sum().item() < 1e9 else -logits


def waits_for_the_device(logits):
    torch.cuda.synchronize()
    return logits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("obstacle", [reads_a_number, waits_for_the_device])
def test_on_a_gpu_a_failed_capture_does_no_harm(obstacle):
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(16, 3), nn.Dropout()

        def forward(self, x):
            return obstacle(self.linear(self.dropout(x.flatten(1))))

    torch.manual_seed(0)
    network, stream = ReplayedNetwork(Waits().cuda()), torch.cuda.current_stream()
    for _ in range(2):
        network(images(6).cuda()).sum().backward()
        network.passed_back()
    assert network.replayed is None
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    first, second = torch.rand(3, device="cuda"), torch.rand(3, device="cuda")
    assert first.isfinite().all() and not torch.equal(first, second)

    other = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 3)).cuda()
    after = ReplayedNetwork(other)
    after(images(6).cuda()).sum().backward()
    assert after.replayed is not None
