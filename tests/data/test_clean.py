"""The defender's clean set: balanced, disjoint from the evaluation set, seeded."""

import pytest
import torch

from marginclip.data.clean import automatic_sizes, split_clean
from marginclip.errors import UserError

CLASSES = tuple("abcde")
LABELS = torch.arange(5).repeat(20)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("order", ["seeded", "first"])
@pytest.mark.parametrize("per_class", [1, 7, 20, None])
def test_the_parts_are_disjoint_whole_and_balanced(order, per_class):
    clean, evaluation = split_clean(LABELS, CLASSES, per_class=per_class, seed=0, order=order)
    assert sorted(clean.tolist() + evaluation.tolist()) == list(range(100))
    assert torch.bincount(LABELS[clean], minlength=5).tolist() == [per_class or 20] * 5
    assert clean.tolist() == sorted(clean.tolist())
    assert evaluation.tolist() == sorted(evaluation.tolist())


def test_first_takes_the_first_of_each_class():
    labels = LABELS.tolist()
    expected = sorted(index for label in range(5) for index in [i for i, y in enumerate(labels) if y == label][:4])
    for seed in (0, 1):
        assert split_clean(LABELS, CLASSES, per_class=4, seed=seed, order="first")[0].tolist() == expected


def test_seeded_is_a_function_of_the_seed_and_zero_is_a_seed():
    torch.manual_seed(9)
    draws = [split_clean(LABELS, CLASSES, per_class=4, seed=seed)[0].tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] != split_clean(LABELS, CLASSES, per_class=4, seed=0, order="first")[0].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_class": 21}, "clean_per_class=21 is more than class 'a' has: 20 held-out images"),
        ({"per_class": 0}, "at least 1, got 0"),
        ({"per_class": 1, "order": "random"}, "'seeded' or 'first', got 'random'"),
        ({"per_class": 1, "classes": (*CLASSES, "f")}, "class 'f' has no clean images"),
        ({"per_class": None, "classes": (*CLASSES, "f")}, "class 'f' has no clean images"),
    ],
)
def test_what_cannot_be_had_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        split_clean(LABELS, **({"classes": CLASSES, "seed": 0} | settings))


def test_the_reserve_makes_one_evaluation_set_for_clean_sets_of_any_size():
    small, large = (split_clean(LABELS, CLASSES, per_class=count, seed=3, reserve=9) for count in (4, 9))
    assert torch.equal(small[1], large[1])
    assert set(small[0].tolist()) < set(large[0].tolist())
    assert len(small[1]) == 5 * 11
    beyond = split_clean(LABELS, CLASSES, per_class=12, seed=3, reserve=9)
    assert not set(beyond[0].tolist()) & set(beyond[1].tolist())


@pytest.mark.parametrize(
    ("count", "wanted", "sizes"),
    [(1000, 50, (50, 500)), (1000, 500, (500, 500)), (150, 50, (50, 75)), (150, 200, (75, 75)), (1, 50, (1, 1))],
)
def test_automatic_sizes_leave_half_of_the_smallest_class(count, wanted, sizes):
    labels = torch.cat([torch.zeros(count + 7), torch.ones(count)]).long()
    assert automatic_sizes(labels, wanted) == sizes
