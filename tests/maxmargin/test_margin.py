"""Margins against sorting and loops; margin ascent against a class-by-class loop and the closed form of a linear model."""

import copy

import pytest
import torch
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.errors import UserError
from marginclip.maxmargin.margin import ascend_margins, margin, random_starts

CLASSES = torch.arange(4).repeat_interleave(3)


@pytest.fixture
def starts(images):
    return images.double()


@pytest.fixture
def net64(net):
    """The small network in float64, where batching changes no bit."""
    return net.double()


def by_hand(model, classes, starts, *, steps, step_size, momentum=0.0):
    """Class by class: plain ascent on the summed margin, one state of momentum, the best image of each on the way."""
    images, margins = starts.clone(), torch.zeros(len(starts), dtype=starts.dtype)
    for label in classes.unique():
        mine = (classes == label).nonzero().flatten()
        x, velocity, best = starts[mine], 0.0, None
        for _ in range(steps + 1):
            x = x.detach().requires_grad_()
            logits = model(x)
            others = [k for k in range(logits.shape[1]) if k != label]
            values = logits[:, label] - logits[:, others].max(1).values
            for row, index in enumerate(mine):
                if best is None or values[row] > margins[index]:
                    images[index], margins[index] = x[row].detach(), values[row].detach()
            best = True
            (gradient,) = torch.autograd.grad(values.sum(), x)
            velocity = momentum * velocity + gradient
            x = (x.detach() + step_size * velocity).clamp(0, 1)
    return images, margins


def test_margin_is_the_gap_to_the_best_other_class():
    logits = torch.randn(50, 7)
    for label in range(7):
        expected = [row[label] - max(value for k, value in enumerate(row) if k != label) for row in logits]
        assert torch.equal(margin(logits, torch.full((50,), label)), torch.stack(expected))


def test_margin_of_the_decision_is_top1_minus_top2_and_others_are_not_positive():
    logits = torch.randn(50, 5) * 2000  # a mask of -1000 would not do
    decisions = logits.argmax(1)
    top = logits.topk(2).values
    assert torch.equal(margin(logits, decisions), top[:, 0] - top[:, 1])
    assert (margin(logits, (decisions + 1) % 5) <= 0).all()


def test_margin_of_a_tie_is_zero_and_the_logits_stay_as_they_are():
    logits = torch.tensor([[1.0, 1.0, 0.0]])
    assert margin(logits, torch.tensor([0])).tolist() == [0.0]
    assert logits.tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.9])
def test_ascent_equals_a_class_by_class_loop_bit_for_bit(momentum, net64, starts):
    found = ascend_margins(net64, CLASSES, starts, steps=15, step_size=0.5, momentum=momentum)
    images, margins = by_hand(net64, CLASSES, starts, steps=15, step_size=0.5, momentum=momentum)
    assert torch.equal(found.images, images)
    torch.testing.assert_close(
        found.margins, margins, atol=1e-12, rtol=1e-12
    )  # the last pass, without gradients, may round otherwise
    assert found.steps == 15


@pytest.mark.parametrize("budget", [1, 20_000, 2**40])
def test_chunks_change_nothing(budget, net64, starts):
    whole = ascend_margins(net64, CLASSES, starts, steps=5, step_size=0.5)
    seen = []
    net64.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    chunked = ascend_margins(net64, CLASSES, starts, steps=5, step_size=0.5, memory_budget=budget)
    torch.testing.assert_close(chunked.images, whole.images, rtol=0, atol=1e-12)
    torch.testing.assert_close(chunked.margins, whole.margins, rtol=0, atol=1e-12)
    assert seen.pop(0) == 2  # the pass that is measured: some models squeeze a batch of one away
    assert (max(seen) == 1, max(seen) == 12) == (budget == 1, budget == 2**40)


@pytest.mark.parametrize("rule", ["raw", "unit_norm", "unit_rms", "sign"])
def test_images_stay_feasible_and_no_margin_falls(rule, net, images):
    before = images.clone()
    found = ascend_margins(net, CLASSES, images, steps=20, step_size=3.0, rule=rule, momentum=0.5)
    assert torch.equal(found.images, found.images.clamp(0, 1))
    assert (found.margins >= found.initial_margins).all()
    assert (found.margins > found.initial_margins).float().mean() >= 0.95
    torch.testing.assert_close(found.initial_margins, margin(net(before), CLASSES))
    torch.testing.assert_close(found.margins, margin(net(found.images), CLASSES))
    assert torch.equal(images, before)


@pytest.mark.parametrize(("rule", "length"), [("unit_norm", 0.01), ("unit_rms", 0.01 * 192**0.5), ("sign", 0.01 * 192**0.5)])
def test_one_step_has_the_length_of_its_rule(rule, length, net, images):
    centre = images / 2 + 0.25
    found = ascend_margins(net, CLASSES, centre, steps=1, step_size=0.01, rule=rule)
    torch.testing.assert_close((found.images - centre).flatten(1).norm(dim=1), torch.full((12,), length))


def test_no_step_gives_the_starts(net, images):
    found = ascend_margins(net, CLASSES, images, steps=0)
    assert torch.equal(found.images, images)
    assert torch.equal(found.margins, found.initial_margins)


@pytest.mark.parametrize("rule", ["raw", "unit_norm", "unit_rms", "sign"])
def test_linear_model_of_two_classes_reaches_the_exact_corner(rule, settle):
    model = settle(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    weights, bias = model[1].weight.detach(), model[1].bias.detach()
    classes = torch.tensor([0, 1, 0, 1])
    found = ascend_margins(model, classes, torch.rand(4, 3, 2, 2), steps=400, step_size=0.2, rule=rule)
    for image, value, label in zip(found.images, found.margins, classes.tolist(), strict=True):
        gap = weights[label] - weights[1 - label]
        assert torch.equal(image.flatten(), (gap > 0).float())
        torch.testing.assert_close(value, gap.clamp(min=0).sum() + bias[label] - bias[1 - label])


def test_saturated_pixels_keep_their_gradient():
    """Only a pixel of value 0 or 1 to start with: a clamp inside the model would hold it there for ever."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).requires_grad_(False)
    model[1].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    found = ascend_margins(model, torch.tensor([0]), torch.tensor([[[[0.0, 1.0]]]]), steps=100, step_size=0.1)
    assert found.images.flatten().tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_works_where_gradients_are_off(mode, net, images):
    expected = ascend_margins(net, CLASSES, images, steps=5)
    with mode():
        found = ascend_margins(net, CLASSES.clone(), images.clone(), steps=5)
    assert torch.equal(found.images, expected.images)
    assert not found.images.requires_grad
    assert not found.margins.requires_grad


def test_gradients_reach_neither_weights_nor_bounds(net, images):
    bounded = BoundedNetwork(net, images[0])
    bounded.set_constant(0.5)
    for model in (net, bounded):
        ascend_margins(model, CLASSES, images, steps=3)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in copy.deepcopy(model).parameters()]


def test_the_search_is_on_the_network_that_it_is_given(net, images):
    """The published script searches on the unbounded network; here the bounds count, and margins under them are lower."""
    bounded = BoundedNetwork(net, images[0])
    free = ascend_margins(bounded, CLASSES, images, steps=30, step_size=0.5)
    assert torch.equal(free.margins, ascend_margins(net, CLASSES, images, steps=30, step_size=0.5).margins)
    bounded.set_from_images(images, share=0.5)
    bound = ascend_margins(bounded, CLASSES, images, steps=30, step_size=0.5)
    assert bound.margins.mean() < free.margins.mean()
    torch.testing.assert_close(bound.margins, margin(bounded(bound.images), CLASSES).detach())


def test_every_module_gets_its_mode_back_and_batch_norm_stays(net, images):
    net.train()
    net[1].eval()
    modes, state = [module.training for module in net.modules()], copy.deepcopy(net.state_dict())
    found = ascend_margins(net, CLASSES, images, steps=3)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(found.images, ascend_margins(net.eval(), CLASSES, images, steps=3).images)


def test_modes_come_back_after_an_error(net, images):
    net.train()
    with pytest.raises(RuntimeError):
        ascend_margins(net, CLASSES, images[:, :2], steps=3)
    assert net.training


def test_tolerance_ends_a_finished_search_early(settle):
    model = settle(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    starts, classes = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
    settings = {"steps": 300, "step_size": 0.2, "rule": "sign"}
    full = ascend_margins(model, classes, starts, **settings)
    early = ascend_margins(model, classes, starts, tolerance=1e-4, patience=5, **settings)
    assert full.steps == 300
    assert 5 <= early.steps <= 12  # at most 5 steps to the corner, then 5 without growth
    assert torch.equal(early.images, full.images)


def test_autocast_searches_in_low_precision_and_reports_full(net, images):
    found = ascend_margins(net, CLASSES, images, steps=3, autocast=torch.bfloat16)
    assert (found.images.dtype, found.margins.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(found.margins, margin(net(found.images), CLASSES), atol=0.05, rtol=0.05)


def test_the_budget_counts_saved_activations_but_no_weights(images):
    """Fifty sines keep fifty images of 768 bytes; the dense layer's weights are as large as 192 images."""

    class Sines(nn.Sequential):
        def forward(self, x):
            seen.append(len(x))
            for _ in range(50):
                x = x.sin()
            return super().forward(x)

    seen = []
    ascend_margins(Sines(nn.Flatten(), nn.Linear(192, 192)), CLASSES, images, steps=1, memory_budget=int(4.5 * 50 * 768))
    assert max(seen) == 4


def test_random_starts_are_uniform_and_a_function_of_the_generator():
    first, second = (random_starts(200, (3, 4, 4), generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (200, 3, 4, 4)
    assert 0 <= first.min() < 0.01 < 0.99 < first.max() <= 1
    assert first.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rule": "l2"}, "one of raw, unit_norm, unit_rms, sign, got 'l2'"),
        ({"steps": -1}, "steps >= 0"),
        ({"step_size": 0.0}, "step_size > 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
        ({"memory_budget": 0}, "memory_budget must be positive, got 0"),
        ({"classes": torch.tensor([0])}, "got 1 classes and 12 starts"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"patience": 0}, "patience"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(setting, message, net, images):
    with pytest.raises(UserError, match=message):
        ascend_margins(net, **({"classes": CLASSES, "starts": images} | setting))
