"""The command that repeats a run, composed again: it must give the very configuration of the record."""

import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from marginclip.experiment.command import plain
from marginclip.record import RunRecord
from marginclip.reporting.dashboard.repeat import literal, repeat_command

CONF = Path(__file__).parents[3] / "conf"


def composed(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(compose("defend", overrides=list(overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ["attack=wanet", "defense.steps=7", "defense/schedule=authors_code", "defense/detector=paper"],
        ["training=long_tail", "imbalance=exponential", "loss=gcl", "defense=mmom", "logger=csv", "trainer=exact"],
        ["victim=checkpoint", "victim.path='it\\'s a b/c.pt'", "attack=adaptive", "model.mean=[0.1,0.2,0.3]", "detect=mmbd"],
        ["dataset=image_folder", "dataset.root=/x/y", "training=finetune", "defense=auto", "clean_per_class=null", "seed=5"],
        ["logger=none"],
    ],
)
def test_the_command_composes_to_the_configuration_of_the_record(overrides):
    config = composed(*overrides)
    program, command, *words = shlex.split(repeat_command(RunRecord(config=config, seed=0)))
    assert (program, command) == ("marginclip", "defend")
    assert composed(*words) == config


def test_a_default_run_has_a_short_command():
    command = repeat_command(RunRecord(config=composed("attack=blend"), seed=0))
    assert "attack=blend" in command and "defense=mmdf" in command
    assert "defense.steps" not in command and len(command) < 400


def test_an_option_of_the_users_own_is_named_with_its_settings():
    config = {"attack": {"name": "mine", "_target_": "my.Attack", "rate": 0.5}}
    words = shlex.split(repeat_command(RunRecord(config=config, seed=0)))
    assert words[2:] == ["attack=mine", "++attack.name=mine", "++attack._target_=my.Attack", "++attack.rate=0.5"]


@pytest.mark.parametrize(
    "text", ["", "null", "true", "1.5", "a b", "it's", "\\", "\\'", "a\\\\'b", "${x}", "a,b", "é=ü", "x" * 50]
)
def test_any_text_comes_through_hydras_grammar(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([f"key={literal(text)}"])
    assert getattr(override.value(), "text", override.value()).replace("\\'", "'") == text.replace("\\'", "'")
