"""Whom an attack flips and to what, and which training images it poisons, against loops over labels."""

import pytest
import torch

from marginclip.attacks import X2X, AllToAll, AllToOne, Attack, CleanLabel, OneToOne
from marginclip.attacks.wanet import batch_shares
from marginclip.errors import UserError

LABELS = torch.arange(10).repeat_interleave(50)[torch.randperm(500, generator=torch.Generator().manual_seed(2))]
# Setting: (object, eligible label, label that the attacker wants)
SETTINGS = {
    "all2one": (AllToOne(10, target=3), lambda y: y != 3, lambda y: 3),
    "one2one": (OneToOne(10, source=5, target=0), lambda y: y == 5, lambda y: 0),
    "all2all": (AllToAll(10), lambda y: True, lambda y: (y + 1) % 10),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_eligible_and_flipped_labels(name):
    x2x, eligible, wanted = SETTINGS[name]
    assert x2x.name == name
    assert x2x.eligible(LABELS).tolist() == [eligible(y) for y in LABELS.tolist()]
    chosen = LABELS[x2x.eligible(LABELS)]
    assert x2x.flipped(chosen).tolist() == [wanted(y) for y in chosen.tolist()]
    assert x2x.flipped(chosen).dtype == torch.int64
    assert (x2x.flipped(chosen) != chosen).all()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("rate", "count"), [(0.1, 5), (0.02, 1), (0.001, 1), (1.0, 50)])
def test_the_same_count_of_every_eligible_class_is_poisoned_and_no_other(name, rate, count):
    x2x, eligible, wanted = SETTINGS[name]
    attack = Attack(x2x, (3, 8, 8), rate=rate)
    mask, before = attack.poisoned_mask(LABELS), LABELS.clone()
    for label in range(10):
        assert mask[LABELS == label].sum() == (count if eligible(label) else 0)
    assert attack.poisoned_labels(LABELS)[mask].tolist() == [wanted(y) for y in LABELS[mask].tolist()]
    assert torch.equal(LABELS, before)


def test_poisoned_images_are_a_function_of_the_seed():
    torch.manual_seed(3)
    masks = [Attack(AllToAll(10), (3, 8, 8), seed=seed).poisoned_mask(LABELS) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_drawn_classes_are_valid_distinct_and_a_function_of_the_seed():
    targets = [AllToOne(10, seed=seed).target for seed in range(100)]
    again = [AllToOne(10, seed=seed).target for seed in range(100)]
    assert targets == again
    assert sorted(set(targets)) == list(range(10))
    pairs = [OneToOne(3, seed=seed) for seed in range(100)]
    assert {(pair.source, pair.target) for pair in pairs} == {(s, t) for s in range(3) for t in range(3) if s != t}


@pytest.mark.parametrize("given", range(4))
def test_a_given_class_is_kept_and_the_drawn_one_differs(given):
    for seed in range(20):
        assert OneToOne(4, source=given, seed=seed).source == given
        assert OneToOne(4, source=given, seed=seed).target != given
        assert OneToOne(4, target=given, seed=seed).target == given
        assert OneToOne(4, target=given, seed=seed).source != given


class Swapped(X2X):
    """A setting of one's own: classes 0 and 1 change places, ``one_source`` leaves class 1 out."""

    name = "swapped"
    recognises_source = True

    def __init__(self, one_source):
        self.one_source = one_source

    def eligible(self, labels):
        return labels < (1 if self.one_source else 2)

    def flipped(self, labels):
        return 1 - labels


@pytest.mark.parametrize(
    ("x2x", "needed"), [(AllToOne(4), 0.8), (OneToOne(4), 0.8), (AllToAll(4), 0.4), (Swapped(one_source=False), 0.4)]
)
def test_only_an_attack_that_recognises_the_source_first_is_measured_by_the_accuracy(x2x, needed):
    assert Attack(x2x, (3, 8, 8), min_success=0.8).needed_success(0.5) == needed


@pytest.mark.parametrize(("one_source", "poisoned"), [(False, [0, 1, 2, 3]), (True, [0, 4])])
def test_batches_are_poisoned_from_all_classes_or_from_the_one_source(one_source, poisoned):
    chosen, _ = batch_shares(Swapped(one_source), torch.arange(8) % 4, 0.5 if not one_source else 1.0, 1.0, torch.Generator())
    assert chosen.tolist() == poisoned


def test_a_setting_of_ones_own_without_a_target_class_is_refused_by_name():
    with pytest.raises(UserError, match=r"needs x2x=all2one.*got x2x=swapped$"):
        CleanLabel(Swapped(one_source=False), (3, 12, 12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AllToOne(10, target=10), r"x2x.target must be a class in 0..9, got 10"),
        (lambda: AllToOne(10, target=-1), "got -1"),
        (lambda: OneToOne(10, source=12), r"x2x.source must be a class in 0..9, got 12"),
        (lambda: OneToOne(10, source=2, target=2), "must differ, got 2 for both"),
    ],
)
def test_classes_that_do_not_exist_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
