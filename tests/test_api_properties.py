"""Whatever images, labels and modes the public functions are given: a repaired network, or one sentence; the model stays as it is."""

import copy
from contextlib import nullcontext

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import marginclip
from marginclip.defenses import StaticClip
from marginclip.errors import UserError

KINDS = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool, torch.complex64])
SPREADS = st.sampled_from([(0.0, 1.0), (0.0, 0.0), (-1.0, 1.0), (0.0, 255.0), (0.0, float("nan")), (0.0, float("inf"))])
STRIDES = st.sampled_from([
    lambda images: images,
    lambda images: images.to(memory_format=torch.channels_last) if images.dim() == 4 else images,
    lambda images: images.flip(-1),
    lambda images: images.transpose(-1, -2),
    lambda images: images.repeat_interleave(2, 0)[::2],
    lambda images: images[:1].expand_as(images),
    lambda images: images.clone().requires_grad_() if images.is_floating_point() else images,
])  # fmt: skip
SHAPES = st.sampled_from(
    [(12, 1, 6, 6), (12, 3, 6, 6), (1, 1, 6, 6), (0, 1, 6, 6), (12, 1, 6, 5), (12, 6, 6), (12, 36), (12, 1, 1, 6, 6)]
)
LABELS = st.sampled_from([
    lambda count: torch.arange(count) % 3,
    lambda count: (torch.arange(count) % 3).int(),
    lambda count: (torch.arange(count) % 3).float(),
    lambda count: torch.arange(count) % 3 - 1,
    lambda count: torch.arange(count),
    lambda count: torch.zeros(count, dtype=torch.int64),
    lambda count: torch.arange(count + 1) % 3,
    lambda count: torch.eye(3)[torch.arange(count) % 3],
])  # fmt: skip
MODES = st.sampled_from([nullcontext, torch.no_grad, torch.inference_mode])


def network(training):
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return nn.Sequential(*layers).train(training)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(kind=KINDS, spread=SPREADS, stride=STRIDES, shape=SHAPES, labels=LABELS, mode=MODES, training=st.booleans())
def test_repair_gives_a_network_or_one_sentence(kind, spread, stride, shape, labels, mode, training):
    model = network(training)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    refusal, (low, high) = "", spread
    with mode():
        images = stride((low + (high - low) * torch.rand(shape)).to(kind))
        try:
            repaired = marginclip.repair(model, images, labels(shape[0]), defense=StaticClip())
        except UserError as error:
            refusal = str(error)
        else:
            logits = repaired(images.float())
            assert logits.shape == (shape[0], 3)
            assert torch.isfinite(logits).all()
    assert "\n" not in refusal
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())
