"""Whose clean images an adaptive attacker learns bounds from."""

import pytest
import torch

from marginclip.clipping import BoundedNetwork
from marginclip.data.batches import Subset, load_all
from marginclip.defenses import RepairResult
from marginclip.errors import UserError
from marginclip.experiment.setup import build_setup
from marginclip.experiment.training_access import AttackerAccess


class Noting:
    """A defender that keeps what it is given."""

    def __init__(self, **_):
        pass

    def fit(self, model, images, labels, **_):
        Noting.images, Noting.labels = images, labels
        return RepairResult(BoundedNetwork(model, images[:1]))


@pytest.mark.parametrize("whose", ["defender", "training"])
def test_bounds_are_learned_on_the_images_that_are_named(configure, whose):
    spec = configure("attack=none", "clean_per_class=6")
    setup = build_setup(spec)
    learn = AttackerAccess(spec, setup, None).bound_learner(Noting, 6, whose)
    learn(setup.model.eval())
    assert Noting.labels.bincount().tolist() == [6] * 10
    defenders, _ = setup.data.clean_set()
    assert torch.equal(Noting.images, defenders) == (whose == "defender")
    source = setup.splits.held_out if whose == "defender" else setup.splits.train
    own = {image.numpy().tobytes() for image in load_all(Subset(source.images, torch.arange(len(source.labels))))}
    assert all(image.numpy().tobytes() in own for image in Noting.images)


def test_no_other_images_can_be_named(configure):
    with pytest.raises(UserError, match=r"attack.clean_images must be one of defender, training, got 'test'"):
        build_setup(configure("attack=adaptive", "attack.clean_images=test"))
