"""What the docstrings say holds: their examples run, and those of the public API describe every argument, in order."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import marginclip
from marginclip import attacks, data, defenses, losses, maxmargin, metrics, models, training
from marginclip.experiment import loggers
from marginclip.experiment.loggers.csv import CsvRows
from marginclip.experiment.loggers.mlflow import MLflow
from marginclip.experiment.loggers.tensorboard import TensorBoard
from marginclip.experiment.loggers.wandb import WandB

PACKAGE = Path(__file__).parents[1] / "src" / "marginclip"
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if re.search(r"^\s*>>> ", path.read_text(), flags=re.M))
METHODS = [marginclip.Artefact.fit, marginclip.MarginDropDetector.fit]
PUBLIC = [getattr(marginclip, name) for name in marginclip.__all__] + METHODS


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", [module_name(path) for path in WITH_EXAMPLES])
def test_examples_give_what_they_show(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0


def described(text, section):
    """The names that a section of a docstring describes, in its order."""
    body = re.search(rf"^{section}:\n((?:    .*\n?|\n)*)", inspect.cleandoc(text) + "\n", flags=re.M)
    return re.findall(r"^    (\**\w+): \S", body[1], flags=re.M) if body else []


def arguments(thing):
    kinds = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
    return [kinds.get(one.kind, "") + one.name for one in inspect.signature(thing).parameters.values() if one.name != "self"]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__qualname__)
def test_every_argument_is_described_in_order(thing):
    if thing is marginclip.UserError:
        return  # an exception that users catch and never make
    if inspect.isclass(thing) and issubclass(thing, marginclip.BoundLearning) and not described(thing.__doc__, "Args"):
        assert arguments(thing) == arguments(marginclip.BoundLearning)
        thing = marginclip.BoundLearning
    assert described(thing.__doc__, "Args") == arguments(thing)


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__qualname__)
def test_functions_say_what_they_return_and_raise(thing):
    if not inspect.isclass(thing):
        assert re.search(r"^Returns:\n    \S", inspect.cleandoc(thing.__doc__), flags=re.M)
        assert described(thing.__doc__, "Raises") == ["UserError"]


def test_the_reading_of_sections_is_right():
    text = """One.

    Args:
        first: a thing: with a colon.
            second line: of the same.
        **rest: more.

    Raises:
        UserError: never.
    """
    assert described(text, "Args") == ["first", "**rest"]
    assert described(text, "Raises") == ["UserError"]
    assert described(text, "Returns") == []


OPTIONS = [
    getattr(module, name)
    for module in (attacks, defenses, losses)
    for name in module.__all__
    if inspect.isclass(getattr(module, name)) and not inspect.isabstract(getattr(module, name))
]
# Of these modules, functions describe their arguments, too.
OPTIONS += [
    thing
    for module in (models, data, maxmargin, training, metrics, loggers)
    for thing in (getattr(module, name) for name in module.__all__)
    if not inspect.isabstract(thing)
]
OPTIONS += [CsvRows, MLflow, TensorBoard, WandB]  # what the option files of conf/logger make
# They describe no arguments: contracts, what a defense gives back, and subclasses that take those of their base.
WITHOUT_ARGUMENTS = {
    "X2X",
    "Defense",
    "ComputedDefense",
    "LearningDefense",
    "RepairResult",
    "Variant",
    "Network",
    "MMBM",
    "MMOM",
    "BoundObjective",
    "Agreement",
    "CleanAccuracy",
    "AttackSuccessRate",
    "PoisonedAccuracy",
    "FlaggedRate",
}


@pytest.mark.parametrize(
    "thing", [one for one in OPTIONS if one.__name__ not in WITHOUT_ARGUMENTS], ids=lambda one: one.__qualname__
)
def test_options_describe_every_argument_in_order(thing):
    assert described(thing.__doc__, "Args") == arguments(thing)


@pytest.mark.parametrize("thing", [one for one in OPTIONS if inspect.isfunction(one)], ids=lambda one: one.__qualname__)
def test_functions_of_options_say_what_they_give(thing):
    assert re.search(r"^(Returns|Yields):\n    \S", inspect.cleandoc(thing.__doc__), flags=re.M)


def test_only_what_describes_nothing_is_left_out():
    left_out = [one for one in OPTIONS if one.__name__ in WITHOUT_ARGUMENTS]
    assert [one.__name__ for one in left_out if described(one.__doc__, "Args")] == []
