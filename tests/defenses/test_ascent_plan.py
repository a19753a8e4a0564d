"""How many margin inputs there are, and of which classes, when there are few classes and when there are many."""

import pytest
import torch

from marginclip.defenses import AscentPlan
from marginclip.errors import UserError


@pytest.mark.parametrize(("classes", "starts"), [(2, 5), (10, 5), (20, 5), (43, 2), (100, 1)])
def test_all_classes_have_as_many_starts_as_the_limit_leaves(classes, starts):
    wanted = AscentPlan(starts_per_class=5, max_inputs=100).classes(classes, refresh=3)
    assert wanted.bincount().tolist() == [starts] * classes


def test_without_a_limit_they_grow_with_the_classes():
    assert len(AscentPlan(starts_per_class=5, max_inputs=None).classes(1000)) == 5000


def test_of_more_classes_each_refresh_takes_others_and_all_have_their_turn():
    plan = AscentPlan(max_inputs=30)
    refreshes = [plan.classes(100, refresh=number, seed=1) for number in range(10)]
    assert {len(wanted) for wanted in refreshes} == {30}
    assert torch.cat(refreshes).bincount(minlength=100).tolist() == [3] * 100  # 300 inputs: three whole turns
    assert torch.equal(plan.classes(100, refresh=4, seed=1), refreshes[4])
    assert not torch.equal(plan.classes(100, refresh=4, seed=2), refreshes[4])
    assert not torch.equal(refreshes[0].sort().values, torch.arange(30))


def test_inputs_that_are_kept_need_all_classes():
    with pytest.raises(UserError, match=r"warm_start keeps the margin inputs of all 100 classes: .* got 30"):
        AscentPlan(max_inputs=30, warm_start=True).classes(100)
    with pytest.raises(UserError, match=r"defense\.ascent\.max_inputs must be at least 1 or null, got 0"):
        AscentPlan(max_inputs=0)


def test_start_rows_are_of_other_classes():
    labels = torch.arange(60) % 6
    wanted = torch.arange(6).repeat_interleave(4)
    rows = AscentPlan().start_rows(labels, wanted, torch.Generator().manual_seed(0))
    assert bool((labels[rows] != wanted).all())
    for label in range(6):
        assert len(set(rows[wanted == label].tolist())) == 4
