"""The adaptive attacker: what a batch holds, when bounds are learned, and what it refuses."""

from functools import partial

import pytest
import torch

from marginclip.attacks import Adaptive, AllToAll, AllToOne, BadNet, InputAware, OneToOne
from marginclip.data import Augment
from marginclip.errors import UserError

SHAPE = (3, 12, 12)
SETTINGS = [AllToOne(4, target=2), OneToOne(4, source=1, target=3), AllToAll(4)]


def make(x2x=None, base=BadNet, timing="before_augmentation", **settings):
    return Adaptive(x2x or SETTINGS[0], SHAPE, base=partial(base, timing=timing), defender=lambda **_: None, **settings)


def stored(count=12):
    return torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(0)) / 255


@pytest.mark.parametrize("x2x", SETTINGS, ids=lambda x2x: x2x.name)
def test_every_image_that_can_be_flipped_appears_once_more_triggered(x2x):
    attack, images, labels = make(x2x), stored(), torch.arange(12) % 4
    before, mask = images.clone(), attack.poisoned_mask(labels)
    batch = attack.poison_batch(images, labels, mask, Augment(), torch.Generator())
    flippable = [i for i, y in enumerate(labels.tolist()) if x2x.eligible(torch.tensor([y]))[0]]
    assert not mask.any()
    assert torch.equal(images, before)
    assert torch.equal(batch["images"], torch.cat([images, attack.base(images[flippable])]))
    assert batch["labels"].tolist() == labels.tolist() + [int(x2x.flipped(labels[[i]])) for i in flippable]
    assert batch["triggered"].tolist() == [False] * 12 + [True] * len(flippable)


@pytest.mark.parametrize("timing", ["before_augmentation", "after_augmentation"])
def test_copies_are_triggered_on_the_side_of_augmentation_that_the_base_says(timing):
    attack, images, labels = make(AllToAll(4), timing=timing), stored(), torch.arange(12) % 4
    augment, mask = Augment(crop_padding=2, flip=True), attack.poisoned_mask(labels)
    made = attack.poison_batch(images, labels, mask, augment, torch.Generator().manual_seed(3))["images"]
    if timing == "after_augmentation":
        augmented = augment(images, torch.Generator().manual_seed(3))
        expected = torch.cat([augmented, attack(augmented)])
    else:
        expected = augment(torch.cat([images, attack(images)]), torch.Generator().manual_seed(3))
    assert torch.equal(made, expected)


def test_the_trigger_is_that_of_the_base_and_travels():
    attack, restored = make(seed=0), make(seed=1)
    assert torch.equal(attack(stored()), BadNet(SETTINGS[0], SHAPE, seed=0)(stored()))
    restored.load_state_dict(attack.state_dict())
    assert torch.equal(attack(stored()), restored(stored()))


def test_the_plan_is_rounds_of_epochs_whatever_the_training_says():
    assert make(rounds=3, epochs_per_round=2).training_plan(50) == {"max_epochs": 6}
    assert make(rounds=1, max_batches=7).training_plan(50) == {"max_epochs": 2, "limit_train_batches": 7}


def test_bounds_are_learned_by_what_training_access_gives():
    class TrainingAccess:
        def load_base_victim(self, base):
            self.base = base

        def bound_learner(self, defender, clean_per_class, images):
            self.given = defender, clean_per_class, images
            return lambda model: {"of": model}

    attack, access = make(clean_per_class=9), TrainingAccess()
    with pytest.raises(UserError, match="must be prepared before it trains"):
        attack.learn_bounds(None)
    attack.prepare(access)
    assert access.base is attack.base
    assert access.given == (attack.defender, 9, "defender")
    assert attack.learn_bounds("model") == {"of": "model"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": -1}, "attack.beta must not be negative, got -1"),
        ({"unbounded_weight": -1}, "attack.unbounded_weight must not be negative, got -1"),
        ({"rounds": 0}, "attack.rounds must be at least 1, got 0"),
        ({"epochs_per_round": 0}, "attack.epochs_per_round must be at least 1, got 0"),
        ({"learning_rate": 0}, "attack.learning_rate must be positive, got 0"),
        ({"max_batches": 0}, "attack.max_batches must be at least 1 or null, got 0"),
        ({"clean_images": "test"}, "attack.clean_images must be one of defender, training, got 'test'"),
        ({"clean_per_class": 0}, "attack.clean_per_class must be at least 1, got 0"),
        (
            {"base": InputAware, "timing": "after_augmentation"},
            "attack.base must be an attack on the training data alone, got InputAware",
        ),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        make(**setting)
