"""The clean-label attack: whose images change and by how much, PGD against its closed form, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.attacks import AllToAll, AllToOne, CleanLabel, OneToOne, Surrogate
from marginclip.attacks.clean_label import pgd
from marginclip.data import Augment, ImageData, ImageSet, Splits
from marginclip.errors import UserError

SHAPE = (3, 12, 12)
CLASSES = tuple("abcd")


def make(x2x=None, **settings):
    return CleanLabel(x2x or AllToOne(4, target=2), SHAPE, **({"eps": 0.2, "step_size": 0.05, "margin": 2} | settings))


def image_set(count, seed):
    """Noise around a colour of its own for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    colours = torch.eye(4)[labels][:, :3].view(count, 3, 1, 1) * 0.3
    noise = torch.rand(count, *SHAPE, generator=generator) * 0.6
    return ImageSet(((colours + noise) * 255).round().to(torch.uint8), labels, CLASSES)


def linear_classifier(classes=4, seed=0):
    """Logits that are linear in the pixels."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(model[1].weight.shape, generator=generator))
    return model.requires_grad_(False)


class TrainingAccess:
    """Training data in memory, a surrogate, and a note of what is replaced."""

    def __init__(self, splits, data, surrogate):
        self.train, self.data, self.surrogate, self.asked = splits.train, data, surrogate, []

    def training_labels(self):
        return self.train.labels

    def training_images(self, index):
        return self.train.images[index].float() / 255

    def replace_training_images(self, index, images):
        self.index, self.hard = index, images
        self.data.replace_training_images(index, (images * 255).round().to(torch.uint8))

    def robust_surrogate(self, settings):
        self.asked.append(settings)
        return self.surrogate


@pytest.fixture
def splits():
    return Splits(image_set(80, 0), image_set(40, 1))


def prepared(splits, **settings):
    """The attack, its data, and the access after the preparation, with a surrogate trained for a moment."""
    attack = make(**settings)
    data = ImageData(splits, attack=attack, augment=Augment(), batch_size=80, clean_per_class=5)
    images, labels = splits.train.images.float() / 255, splits.train.labels
    surrogate = linear_classifier()
    for _ in range(60):
        weights = [value.detach().requires_grad_(True) for value in surrogate[1].parameters()]
        loss = F.cross_entropy(F.linear(images.flatten(1), *weights), labels)
        for value, gradient in zip(surrogate[1].parameters(), torch.autograd.grad(loss, weights), strict=True):
            value.data -= 0.05 * gradient
    access = TrainingAccess(splits, data, surrogate)
    attack.prepare(access)
    return attack, data, access


def test_only_images_of_the_target_class_change_and_no_label_does(splits):
    before = splits.train.images.clone(), splits.train.labels.clone()
    attack, data, access = prepared(splits, rate=0.6)
    assert len(access.index) == len(access.index.unique()) == 12  # of twenty
    assert set(splits.train.labels[access.index].tolist()) == {2}
    assert torch.equal(splits.train.images, before[0]) and torch.equal(splits.train.labels, before[1])
    (raw,) = data.train_dataloader()
    order, made = raw["labels"].clone(), data.on_after_batch_transfer(dict(raw), 0)
    assert torch.equal(made["labels"], order)
    index = next(iter(data.train_dataloader().sampler))[1]
    changed = (made["images"] != before[0][index].float() / 255).flatten(1).any(1)
    assert sorted(index[changed].tolist()) == sorted(access.index.tolist())
    hard = access.hard[[access.index.tolist().index(i) for i in index[changed].tolist()]]
    assert torch.equal(made["images"][changed], attack(hard))


def test_hard_images_are_within_eps_and_in_the_unit_interval_before_the_trigger(splits):
    _, _, access = prepared(splits, eps=0.2)
    moved = (access.hard - access.training_images(access.index)).abs()
    assert moved.max() <= 0.2 + 1e-6
    assert moved.mean() > 0.1
    assert 0 <= access.hard.min() and access.hard.max() <= 1


def test_the_surrogate_recognises_fewer_of_the_hard_images(splits):
    _, _, access = prepared(splits, rate=1.0)

    def accuracy(images):
        return float((access.surrogate(images).argmax(1) == 2).float().mean())

    assert accuracy(access.training_images(access.index)) >= 0.8
    assert accuracy(access.hard) < 0.2
    assert access.asked == [Surrogate()]


def test_pgd_on_a_linear_classifier_of_two_classes_ends_in_the_corner():
    model = linear_classifier(classes=2)
    images, labels = torch.rand(7, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.arange(7) % 2
    before = images.clone()
    found = pgd(model, images, labels, eps=0.1, steps=10, step_size=0.03, generator=torch.Generator(), batch_size=3)
    away = model[1].weight[1 - labels] - model[1].weight[labels]
    corner = (images + 0.1 * away.sign().view_as(images)).clamp(0, 1)
    torch.testing.assert_close(found, corner)
    assert torch.equal(images, before)


def test_pgd_starts_at_random_and_steps_along_the_sign_of_the_gradient():
    model, images, labels = linear_classifier(), torch.full((2, *SHAPE), 0.5), torch.tensor([0, 3])
    found = pgd(model, images, labels, eps=0.1, steps=1, step_size=0.02, generator=torch.Generator().manual_seed(4))
    start = 0.5 + 0.1 * (torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(4)) * 2 - 1)
    error = model(start).softmax(1) - F.one_hot(labels, 4)
    gradient = (error @ model[1].weight).view_as(start)  # of the cross entropy, by hand
    torch.testing.assert_close(found, (start + 0.02 * gradient.sign()).clamp(0.4, 0.6))


def test_poisoned_images_are_a_function_of_the_seed_and_keep_their_label():
    labels = torch.arange(80) % 4
    masks = [make(rate=0.5, seed=seed).poisoned_mask(labels) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert masks[0].sum() == 10
    assert make().poisoned_labels(labels[masks[0]]).tolist() == [2] * 10
    assert make(rate=0.001).poisoned_mask(labels).sum() == 1


@pytest.mark.parametrize("x2x", [AllToAll(4), OneToOne(4, source=0, target=1)], ids=lambda x2x: x2x.name)
def test_other_settings_than_all2one_are_refused_by_name(x2x):
    with pytest.raises(UserError, match=f"^attack=clean_label needs x2x=all2one: .*; got x2x={x2x.name}$"):
        make(x2x)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: make(eps=0), r"attack.eps must be in \(0, 1\), got 0"),
        (lambda: make(eps=16), "got 16"),
        (lambda: make(steps=0), "attack.steps must be at least 1, got 0"),
        (lambda: make(step_size=0), "attack.step_size must be positive, got 0"),
        (lambda: Surrogate(epochs=0), "attack.surrogate.epochs must be at least 1, got 0"),
        (lambda: Surrogate(eps=1), r"attack.surrogate.eps must be in \(0, 1\), got 1"),
    ],
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(UserError, match=message):
        bad()
