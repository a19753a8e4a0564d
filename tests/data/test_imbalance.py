"""Imbalanced training sets: the published counts and images, whole classes in order, nothing else touched."""

import numpy as np
import pytest
import torch
from scipy import stats

from marginclip.data import ImageData, ImageSet, Imbalance, Splits
from marginclip.data.imbalance import class_counts
from marginclip.errors import UserError

# As in the code of LDAM-DRW.
CIFAR10 = {
    ("exponential", 100): [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    ("exponential", 10): [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    ("step", 100): [5000] * 5 + [50] * 5,
    ("step", 10): [5000] * 5 + [500] * 5,
}
LT100 = """
500 477 455 434 415 396 378 361 344 328 314 299 286 273 260 248 237 226 216 206 197 188 179 171 163 156 149 142 135 129 123 118
112 107 102 98 93 89 85 81 77 74 70 67 64 61 58 56 53 51 48 46 44 42 40 38 36 35 33 32 30 29 27 26 25 24 23 22 21 20 19 18 17
16 15 15 14 13 13 12 12 11 11 10 10 9 9 8 8 7 7 7 6 6 6 6 5 5 5 5
"""
LT10 = """
500 488 477 466 455 445 434 424 415 405 396 387 378 369 361 352 344 336 328 321 314 306 299 292 286 279 273 266 260 254 248 243
237 232 226 221 216 211 206 201 197 192 188 183 179 175 171 167 163 159 156 152 149 145 142 139 135 132 129 126 123 121 118 115
112 110 107 105 102 100 98 95 93 91 89 87 85 83 81 79 77 75 74 72 70 69 67 66 64 63 61 60 58 57 56 54 53 52 51 50
"""
CIFAR100 = {
    ("exponential", 100): [int(count) for count in LT100.split()],
    ("exponential", 10): [int(count) for count in LT10.split()],
    ("step", 100): [500] * 50 + [5] * 50,
    ("step", 10): [500] * 50 + [50] * 50,
}
TOTALS = {
    10: {("exponential", 100): 12406, ("exponential", 10): 20431, ("step", 100): 25250, ("step", 10): 27500},
    100: {("exponential", 100): 10847, ("exponential", 10): 19573, ("step", 100): 25250, ("step", 10): 27500},
}


@pytest.mark.parametrize(("num_classes", "published"), [(10, CIFAR10), (100, CIFAR100)])
@pytest.mark.parametrize("profile", ["exponential", "step"])
@pytest.mark.parametrize("ratio", [10, 100])
def test_the_published_counts(num_classes, published, profile, ratio):
    counts = class_counts(profile, num_classes, 50000 // num_classes, ratio)
    assert counts == published[profile, ratio]
    assert sum(counts) == TOTALS[num_classes][profile, ratio]
    assert max(counts) / min(counts) == ratio


def test_their_weighted_sums():
    sums = [sum(i * count for i, count in enumerate(class_counts("exponential", 100, 500, ratio))) for ratio in (100, 10)]
    assert sums == [215936, 618934]


def test_counts_never_fall_under_one_and_a_ratio_of_one_keeps_all():
    assert class_counts("exponential", 5, 10, 1000) == [10, 1, 1, 1, 1]
    assert class_counts("step", 5, 10, 1000) == [10, 10, 1, 1, 1]
    assert class_counts("exponential", 4, 7, 1) == class_counts("step", 4, 7, 1) == [7] * 4


def cifar_labels(num_classes, seed=1):
    """Labels (50000,) of as many images of every class, in a drawn order."""
    labels = torch.arange(50000) % num_classes
    return labels[torch.randperm(50000, generator=torch.Generator().manual_seed(seed))]


def within_class(labels, chosen, label):
    """The chosen images of a class by their number within the class."""
    place = {int(index): number for number, index in enumerate((labels == label).nonzero().flatten())}
    return [place[index] for index in chosen[labels[chosen] == label].tolist()]


GOLDEN = {
    10: {
        0: [398, 3833, 4836, 4572, 636, 2545],
        1: [597, 332, 521, 3935, 4800, 1102],
        9: [2204, 3816, 2206, 2507, 1926, 4765],
    },
    100: {0: [90, 254, 283, 445, 461, 15], 1: [277, 307, 436, 88, 261, 57], 99: [348, 153, 363, 361, 299, 353]},
}


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_the_published_images(num_classes, profile):
    labels = cifar_labels(num_classes)
    chosen = Imbalance(profile=profile, ratio=10).choose(labels, num_classes)
    for label, wanted in GOLDEN[num_classes].items():
        assert within_class(labels, chosen, label)[:6] == wanted


def test_images_by_a_slow_version():
    labels = cifar_labels(10)
    random = np.random.RandomState(5)
    wanted = []
    for label, count in enumerate(CIFAR10["exponential", 100]):
        members = [index for index, own in enumerate(labels.tolist()) if own == label]
        random.shuffle(members)
        wanted += members[:count]
    assert Imbalance(ratio=100, subset_seed=5).choose(labels, 10).tolist() == wanted


def test_smaller_sets_lie_in_larger_ones():
    labels = cifar_labels(10)
    few, more = Imbalance(ratio=100).choose(labels, 10), Imbalance(ratio=10).choose(labels, 10)
    steps = Imbalance(profile="step", ratio=100).choose(labels, 10)
    assert set(few.tolist()) < set(more.tolist())
    assert torch.equal(few[labels[few] == 9], steps[labels[steps] == 9])


def test_the_choice_follows_from_its_own_seed_alone():
    labels = cifar_labels(10)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()
    first = Imbalance().choose(labels, 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before[1])
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(Imbalance().choose(labels, 10), first)
    assert not torch.equal(Imbalance(subset_seed=1).choose(labels, 10), first)


def splits(per_class=40, held_out=12, num_classes=4):
    def images(count, offset):
        labels = torch.arange(num_classes).repeat(count)
        pixels = (torch.arange(len(labels)) + offset).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
        return ImageSet(pixels.clone(), labels, tuple("abcd"))

    return Splits(images(per_class, 0), images(held_out, 200))


def test_images_keep_their_labels_and_classes_their_order():
    whole = splits()
    made = Imbalance(ratio=8)(whole)
    train = made.train
    counts = class_counts("exponential", 4, 40, 8)
    assert train.classes == whole.train.classes
    assert train.labels.dtype == torch.int64
    assert train.labels.bincount().tolist() == counts == sorted(counts, reverse=True)
    assert train.labels.tolist() == sorted(train.labels.tolist())
    shown = train.images[torch.arange(len(train.labels))][:, 0, 0, 0].long()
    assert len(set(shown.tolist())) == len(shown)
    assert torch.equal(whole.train.labels[shown], train.labels)
    assert len(whole.train.labels) == 160  # what was given is as it was


def test_what_is_held_out_stays_and_the_clean_set_is_balanced_and_apart():
    made = Imbalance(ratio=8)(splits())
    assert made.held_out.labels.bincount().tolist() == [12] * 4
    data = ImageData(made, clean_per_class=3)
    assert data.class_counts.tolist() == class_counts("exponential", 4, 40, 8)
    assert made.held_out.labels[data.clean_index].bincount().tolist() == [3] * 4
    assert not set(data.clean_index.tolist()) & set(data.eval_index.tolist())


def test_classes_of_other_sizes_are_taken_as_large_as_the_smallest():
    labels = torch.arange(3).repeat_interleave(torch.tensor([50, 30, 70]))
    chosen = Imbalance(ratio=10).choose(labels, 3)
    assert labels[chosen].bincount().tolist() == class_counts("exponential", 3, 30, 10)


def labels_of(loader, epochs):
    """The labels of all training images of some epochs."""
    drawn = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        drawn += [batch["labels"] for batch in loader]
    return torch.cat(drawn)


def test_balanced_batches_of_an_imbalanced_set():
    data = ImageData(Imbalance(ratio=20)(splits()), clean_per_class=3, batch_size=16)
    counts = class_counts("exponential", 4, 40, 20)
    balanced = labels_of(data.balanced().train_dataloader(), epochs=30).bincount()
    assert balanced.sum() == 30 * sum(counts)
    assert stats.chisquare(balanced).pvalue > 0.01
    assert labels_of(data.train_dataloader(), epochs=3).bincount().tolist() == [3 * count for count in counts]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": "linear"}, "imbalance.profile must be one of exponential, step, got 'linear'"),
        ({"ratio": 0.5}, "imbalance.ratio must be a number from 1 up, got 0.5"),
        ({"ratio": float("inf")}, "imbalance.ratio must be a number from 1 up, got inf"),
        ({"subset_seed": -1}, "imbalance.subset_seed must be in [0, 2^32), got -1"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings, message):
    with pytest.raises(UserError) as caught:
        Imbalance(**settings)
    assert str(caught.value) == message
