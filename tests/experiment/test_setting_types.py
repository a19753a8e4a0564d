"""Values of the wrong type are told in one sentence, wherever they stand in the configuration."""

import pytest
from hydra.utils import get_object

from marginclip.attacks import BadNet
from marginclip.errors import UserError
from marginclip.experiment.objects import make
from marginclip.experiment.setting_types import check_types
from marginclip.identity import argument_types

LEARNING = "marginclip.defenses.BoundLearning"
PENALTY = "marginclip.maxmargin.LambdaController"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": LEARNING, "steps": 2.5}, r"^defense.steps must be a whole number, got 2.5$"),
        ({"_target_": LEARNING, "steps": True}, "defense.steps must be a whole number, got True"),
        ({"_target_": LEARNING, "channel_axis": "last"}, "channel_axis must be a whole number or null, got 'last'"),
        ({"_target_": LEARNING, "project": 1}, "defense.project must be true or false, got 1"),
        ({"_target_": LEARNING, "penalty": {"_target_": PENALTY, "initial": "abc"}}, "defense.penalty.initial must be a number, got 'abc'"),
    ],
)  # fmt: skip
def test_wrong_types_are_named(config, message):
    with pytest.raises(UserError, match=message):
        make(config, key="defense")


class OwnDefense:
    def __init__(self, *, steps: int = 3) -> None:
        self.steps = steps


def test_classes_of_ones_own_are_checked_like_ours():
    with pytest.raises(UserError, match=r"^defense.steps must be a whole number, got 'many'$"):
        check_types({"_target_": "own.OwnDefense", "steps": "many"}, "defense", lambda _: OwnDefense)


def test_whole_numbers_are_numbers_and_classes_of_libraries_are_left_alone():
    check_types({"_target_": PENALTY, "initial": 1, "factor": 2.0}, "defense.penalty", get_object)
    check_types({"_target_": "torch.optim.SGD", "lr": "x"}, "training.optimizer", get_object)


def test_arguments_of_base_classes_are_known():
    found = argument_types(BadNet)
    assert found["patch_size"] is int
    assert found["rate"] is float
