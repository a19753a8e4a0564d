"""The memory budget: what is free by the machine's own books, what an image costs, and the same learning in parts."""

import pytest
import torch
from torch import nn

from marginclip.defenses import MMAC, AscentPlan
from marginclip.errors import UserError
from marginclip.networks import memory
from marginclip.networks.memory import free_memory, images_at_once, images_that_fit, memory_budget, memory_limited_to


def test_half_of_what_is_free_unless_it_is_said():
    with memory_limited_to(3):
        assert memory_budget() == 3 * 2**30
        with memory_limited_to(0.5):
            assert memory_budget() == 2**29
        assert memory_budget() == 3 * 2**30
    assert 0.3 * free_memory() < memory_budget() < 0.7 * free_memory()


@pytest.mark.parametrize("gib", [0, -1, "4", True])
def test_a_budget_is_a_positive_number(gib):
    with pytest.raises(UserError, match="memory_gib must be positive or null, got"), memory_limited_to(gib):
        pass


def test_the_smaller_of_machine_and_group_counts(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    (tmp_path / "max").write_text("3000000\n")
    (tmp_path / "now").write_text("1000000\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUPS", ())
    assert free_memory() == 4000 * 1024
    monkeypatch.setattr(memory, "GROUPS", ((str(tmp_path / "max"), str(tmp_path / "now")),))
    assert free_memory() == 2_000_000
    (tmp_path / "max").write_text("max\n")
    assert free_memory() == 4000 * 1024


@pytest.mark.parametrize(("side", "count"), [(28, 250), (32, 250), (64, 250), (128, 62), (224, 20), (5000, 1)])
def test_fewer_large_images_at_once(side, count):
    assert images_at_once(torch.empty(1, 3, side, side, device="meta")) == count


def test_an_image_costs_what_its_layers_keep():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
    image = torch.rand(1, 1, 16, 16)
    kept = 4 * 16 * 16 * (1 + 4)  # the input, and the ReLU's output, which the layer behind it shares
    assert images_that_fit(network, image, network, budget=100 * memory.OVERHEAD * kept) == 100
    assert images_that_fit(network, image, network, budget=1) == 1


def test_learning_in_parts_is_the_same_learning(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    images = torch.rand(40, 1, 8, 8)
    labels = model(images).argmax(1)
    plan = AscentPlan(starts_per_class=3, steps=1, first_steps=1)
    largest = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (
            largest.append(len(inputs[0])) if isinstance(module, nn.Conv2d) and torch.is_grad_enabled() else None
        )
    )
    found = []
    try:
        for gib in (1.0, 2**-30):
            largest.clear()
            with memory_limited_to(gib):
                network = MMAC(steps=4, extra_steps=0, check_every=2, ascent=plan).fit(model, images, labels).network
            found.append((network.bounds_state(), max(largest)))
    finally:
        handle.remove()
    (whole, most), (parts, fewest) = found
    assert most == len(images)
    assert fewest <= 2
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)
