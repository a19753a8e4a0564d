"""What a setting identifies: declared where the setting is, and acted on everywhere."""

import json
from dataclasses import dataclass
from typing import Annotated

import pytest
import torch

from marginclip.data import ImageFolder
from marginclip.identity import Identifies, argument_types, declared, digest, identifying_fields, identifying_settings


@dataclass(frozen=True)
class Recipe:
    """A setting of each kind."""

    rate: float
    folds: Annotated[int, Identifies.RUN]
    cache: Annotated[str | None, Identifies.NOTHING] = None


class Made:
    def __init__(self, *, rate: float, threshold: Annotated[float, Identifies.RUN] = 0.5, **settings: int) -> None:
        self.rate, self.threshold, self.settings = rate, threshold, settings


class Odd:
    def __init__(self, lr: "NotToBeFound") -> None:  # noqa: F821
        self.lr = lr


def find(target):
    return {"mine.Made": Made, "marginclip.ImageFolder": ImageFolder, "torch.optim.SGD": torch.optim.SGD, "odd": Odd}[target]


@pytest.mark.parametrize(("what", "fields"), [(Identifies.VICTIM, {"rate"}), (Identifies.RUN, {"rate", "folds"})])
def test_fields_say_what_they_identify(what, fields):
    assert set(identifying_fields(Recipe(0.1, 2, "here"), what)) == fields


def test_a_type_that_says_nothing_identifies_the_victim():
    assert declared(int) is declared(Annotated[int, "positive"]) is declared(None) is Identifies.VICTIM
    assert declared(Annotated[int, Identifies.RUN]) is Identifies.RUN


def test_arguments_of_a_constructor_say_it_too():
    settings = {"_target_": "mine.Made", "rate": 0.1, "threshold": 0.9, "seed": 3, "nothing": None}
    assert identifying_settings(settings, Identifies.VICTIM, find) == {"_target_": "mine.Made", "rate": 0.1, "seed": 3}
    assert identifying_settings(settings, Identifies.RUN, find)["threshold"] == 0.9


def test_null_is_a_setting_of_a_run_like_any_other():
    """Left out, a setting has its default, which need not be null."""
    settings = {"_target_": "mine.Made", "rate": None}
    assert identifying_settings(settings, Identifies.RUN, find) == settings
    assert identifying_settings(settings, Identifies.VICTIM, find) == {"_target_": "mine.Made"}


def test_null_identifies_a_victim_where_it_is_not_the_default():
    settings = {"_target_": "mine.Spread", "mean": None, "other": None}
    assert identifying_settings(settings, Identifies.VICTIM, lambda target: Spread) == {"_target_": "mine.Spread", "mean": None}


class Spread:
    def __init__(self, *, mean: float | None = 0.5, other: float | None = None) -> None:
        self.mean, self.other = mean, other


def test_nested_objects_and_lists_are_followed():
    settings = {"base": {"_target_": "mine.Made", "threshold": 1.0}, "blocks": (1, 2), "plain": {"threshold": 1.0}}
    found = identifying_settings(settings, Identifies.VICTIM, find)
    assert found == {"base": {"_target_": "mine.Made"}, "blocks": [1, 2], "plain": {"threshold": 1.0}}


def test_where_images_are_cached_is_no_part_of_what_they_are():
    settings = {"_target_": "marginclip.ImageFolder", "root": "a", "size": 32, "cache": "b", "memory_gib": 1.0}
    assert set(identifying_settings(settings, Identifies.RUN, find)) == {"_target_", "root", "size"}


@pytest.mark.parametrize("target", ["torch.optim.SGD", "odd"])
def test_settings_of_classes_that_declare_nothing_all_count(target):
    settings = {"_target_": target, "lr": 0.1}
    assert identifying_settings(settings, Identifies.VICTIM, find) == settings


def test_annotations_are_found_through_settings_that_are_handed_on():
    class Derived(Made):
        def __init__(self, *, extra: Annotated[int, Identifies.NOTHING] = 0, **settings: float) -> None:
            super().__init__(**settings)
            self.extra = extra

    hints = argument_types(Derived)
    assert declared(hints["threshold"]) is Identifies.RUN
    assert declared(hints["extra"]) is Identifies.NOTHING


def test_the_digest_ignores_the_order_of_keys_alone():
    content = {"b": {"d": 3, "c": [1, 2]}, "a": 1}
    assert digest(content) == digest({"a": 1, "b": {"c": [1, 2], "d": 3}}) == digest(json.loads(json.dumps(content)))
    assert digest(content) != digest({"a": 1, "b": {"c": [2, 1], "d": 3}})
    assert len(digest(content)) == 10
