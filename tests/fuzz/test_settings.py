"""A sample of the fuzz over every number of conf/; the whole is ``python tests/fuzz/settings.py``."""

import importlib.util
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("settings.py")


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_settings", PROGRAM)
    module = sys.modules["fuzz_settings"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_numbers_that_cannot_be_are_refused_in_one_sentence(fuzz):
    assert list(fuzz.faults(fuzz.pairs(sample=120, seed=0))) == []


def test_a_key_that_takes_nonsense_is_found(fuzz, monkeypatch):
    """The check of types is what refuses a word for a number."""
    setting = next(each for each in fuzz.settings() if each.key == "training.label_smoothing")
    assert fuzz.fault(setting, "abc") is None
    monkeypatch.setattr("marginclip.experiment.groups.check_values", lambda *_: None)
    monkeypatch.setitem(fuzz.BUILDERS, "training", lambda spec: None)
    assert fuzz.fault(setting, "abc") == "it was accepted"
