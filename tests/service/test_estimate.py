"""What is said before a repair starts, against counting what it does; and how far it is while it runs."""

import pytest
import torch
from torch import nn

from marginclip.defenses import MMAC, MMOM, AscentPlan, FineTune
from marginclip.defenses.clipping.passes import Passes, passes_of, passes_with_folds
from marginclip.networks.memory import memory_limited_to
from marginclip.service.estimate import Speed, in_words, measure


def counted(defense, model, images, labels):
    """Images with and without a backward pass that the first layer of the bounded networks of a repair gets."""
    forward, backward = [0], [0]

    def note(module, inputs):
        if isinstance(module, nn.Conv2d):
            (backward if torch.is_grad_enabled() else forward)[0] += len(inputs[0])

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        defense.fit(model, images, labels)
    finally:
        handle.remove()
    return forward[0], backward[0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


@pytest.fixture
def clean(model):
    images = torch.rand(40, 1, 8, 8)
    return images, model(images).argmax(1)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 6, "batch_size": 10, "ascent": AscentPlan(starts_per_class=2, steps=3, first_steps=5, refresh_every=2)},
        {"steps": 5, "batch_size": 100, "ascent": AscentPlan(starts_per_class=4, steps=1, first_steps=0, refresh_every=3)},
    ],
)
def test_passes_are_those_that_a_repair_takes(model, clean, settings):
    defense = MMAC(extra_steps=0, check_every=2, **settings)
    forward, backward = counted(defense, model, *clean)
    passes = passes_of(defense, 40, 3)
    assert backward == pytest.approx(passes.backward, rel=0.1)
    assert forward < 1.3 * passes.forward


def test_further_repairs_count_and_unknown_courses_are_not_guessed():
    halved = MMAC(batch_size=50, ascent=AscentPlan(starts_per_class=3, max_inputs=50))
    whole, part = passes_of(MMAC(), 500, 10), passes_of(halved, 250, 10)
    assert passes_with_folds(MMAC(), 500, 10, 2).backward == whole.backward + 2 * part.backward
    assert passes_of(FineTune(epochs=1), 500, 10) is None
    assert passes_with_folds(FineTune(epochs=1), 500, 10, 2) is None
    assert passes_of(MMOM(), 500, 10).backward < passes_of(MMAC(), 500, 10).backward * 10


def test_extra_steps_are_the_longest_course():
    usual, longest = (passes_with_folds(MMAC(steps=60, extra_steps=180), 500, 10, 2, longest=extra) for extra in (False, True))
    assert 3.5 * usual.backward < longest.backward < 4.5 * usual.backward
    speed = Speed(forward=0.0, backward=1.0, kept=100, fixed=50, budget=1000)
    assert "about 2 min (up to 6 min where bounds" in in_words(speed, Passes(backward=100), Passes(backward=360))
    assert "up to" not in in_words(speed, Passes(backward=100), Passes(backward=110))


def test_time_and_memory_follow_from_the_passes():
    speed = Speed(forward=1.0, backward=3.0, kept=100, fixed=50, budget=1000)
    assert speed.seconds(Passes(10, 20, at_once=5)) == 10 + 60
    assert speed.memory(Passes(10, 20, at_once=4)) == 50 + 4 * 200
    assert speed.seconds(Passes(10, 20, at_once=6)) == 10 + 20 * 4  # beyond the budget: the forward pass is taken twice
    assert speed.memory(Passes(10, 20, at_once=600)) == 50 + 1000


def test_a_measured_speed_is_one_of_this_network(model, clean):
    with memory_limited_to(2):
        speed = measure(model, clean[0])
    assert speed.budget == 2 * 2**30
    assert 0 < speed.forward < 1
    assert speed.kept >= 4 * 36 * 4
    assert in_words(speed, Passes(1, 1, 1)).startswith(
        "this takes about 1 s and 0.0 GiB beside what is in use (memory_gib limits"
    )
