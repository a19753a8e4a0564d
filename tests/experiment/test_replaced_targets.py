"""A class in the place of an option's own gets the settings that it takes, and no others."""

import pytest
from torch import nn

from marginclip.errors import UserError
from marginclip.experiment.objects import arguments_of, hands_on, make_model
from marginclip.experiment.replaced_targets import fit_to_targets

MODEL = {
    "name": "resnet18",
    "_target_": "marginclip.models.TorchvisionModel",
    "blocks": [1],
    "width": 16,
    "mean": None,
    "std": None,
}


def test_settings_of_the_options_own_class_are_left_out(caplog):
    content = {"seed": 0, "model": MODEL}
    fitted = fit_to_targets(content, ["model._target_=marginclip.models.TorchvisionModel", "seed=0"])
    assert fitted == {"seed": 0, "model": {key: MODEL[key] for key in ("name", "_target_", "mean", "std")}}
    assert (
        "marginclip.models.TorchvisionModel does not take blocks, width: these settings of the option are left out"
        in caplog.text
    )
    assert content["model"] is MODEL and "blocks" in MODEL


def test_what_was_asked_for_is_kept_and_so_fails_loudly():
    words = ["model._target_=marginclip.models.TorchvisionModel", "+model.blocks.0=3", "model.width=8"]
    assert fit_to_targets({"model": MODEL}, words)["model"] == MODEL


def test_nothing_changes_without_a_target_on_the_command_line():
    assert fit_to_targets({"model": MODEL}, ["model.width=8", "~model.mean"]) == {"model": MODEL}
    trainer = {"trainer": {"_target_": "lightning.Trainer", "threads": 1}}
    assert fit_to_targets(trainer, ["trainer._target_=lightning.Trainer"]) == trainer


def test_inner_groups_are_fitted_too():
    content = {
        "training": {"scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "max_lr": 1, "gamma": 0.5}}
    }
    fitted = fit_to_targets(content, ["training.scheduler._target_=torch.optim.lr_scheduler.StepLR"])
    assert fitted["training"]["scheduler"].keys() == {"_target_", "_partial_", "gamma"}


def test_arguments_are_followed_to_the_base_class_that_takes_them():
    class Base:
        def __init__(self, one, *, two=2):
            pass

    class Derived(Base):
        def __init__(self, three, **others):
            super().__init__(**others)

    assert arguments_of(Derived) - {"self"} == {"one", "two", "three"}
    assert arguments_of(lambda one, *rest, two=2, **others: None) == {"one", "two"}


def test_a_target_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match=r"model\._target_='marginclip.models.Nothing' cannot be imported"):
        fit_to_targets(
            {"model": MODEL | {"_target_": "marginclip.models.Nothing"}}, ["model._target_=marginclip.models.Nothing"]
        )


class Fixed(nn.Module):
    """A network whose sizes are written into it."""

    def forward(self, images):
        return images.mean((2, 3))


class Sized(nn.Linear):
    def __init__(self, num_classes, **others):
        super().__init__(4, num_classes, **others)


def test_a_network_is_given_the_sizes_that_it_takes():
    network = make_model({"_target_": "torchvision.models.resnet18"}, num_classes=7, in_channels=3)
    assert network.fc.out_features == 7
    assert make_model({"_target_": f"{__name__}.Sized"}, num_classes=7, in_channels=3).out_features == 7
    assert isinstance(make_model({"_target_": f"{__name__}.Fixed"}, num_classes=7, in_channels=3), Fixed)
    own = make_model({"_target_": "marginclip.models.ResNet", "blocks": [1], "width": 4}, num_classes=7, in_channels=2)
    assert own.conv1.in_channels == 2
    assert hands_on(lambda **others: None) and not hands_on(Fixed) and not hands_on(lambda one: None)


def test_channels_that_a_network_cannot_take_are_one_sentence():
    with pytest.raises(UserError, match=r"^model: .*in_channels"):
        make_model({"_target_": "torchvision.models.resnet18"}, num_classes=7, in_channels=1)
