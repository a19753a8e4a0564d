"""The smallest runs: digits of 16 x 16 pixels, a ResNet of width 4, fp32, two epochs; composed as the entry points do."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from marginclip.experiment.command import plain
from marginclip.experiment.spec import run_spec

ROOT = Path(__file__).parents[2]
TINY = ["dataset=digits", "logger=none", "trainer=exact"]
# Set where the composed configuration has the key and the test's own overrides do not set it.
SMALL = {
    "trainer.enable_progress_bar": False,
    "training.epochs": 2,
    "model.width": 4,
    "clean_per_class": 6,
    "figures": False,
    "defense.steps": 4,
    "defense.extra_steps": 4,
    "defense.check_every": 2,
    "defense.ascent.first_steps": 2,
    "defense.ascent.steps": 1,
    "defense.ascent.starts_per_class": 2,
    "attack.min_success": 0,
}


def make_config(runs_dir, *overrides, name="defend"):
    """The configuration of a command line, written below ``runs_dir`` and made small."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(name, overrides=[*TINY, f"runs_dir={runs_dir}", *overrides], return_hydra_config=True)
    given = {override.partition("=")[0] for override in overrides}
    for key, value in SMALL.items():
        if key not in given and OmegaConf.select(config, key) is not None:
            OmegaConf.update(config, key, value)
    return config


def without_hydra(config):
    """What Hydra hands to a job: the configuration without its own settings."""
    with open_dict(config):
        del config["hydra"]
    return config


@pytest.fixture(scope="session")
def configure_at():
    """Makes the specification of a tiny run whose files live in a folder of the test's choice: ``configure_at(folder, "attack=blend")``."""

    def configure_at(runs_dir, *overrides, name="defend"):
        return run_spec(plain(without_hydra(make_config(runs_dir, *overrides, name=name))))

    return configure_at


@pytest.fixture
def configure(tmp_path, configure_at):
    """Makes the specification of a tiny run whose files live in this test's own folder: ``configure("attack=blend")``."""

    def configure(*overrides, runs_dir=None, name="defend"):
        return configure_at(runs_dir or tmp_path / "runs", *overrides, name=name)

    return configure


@pytest.fixture
def job(tmp_path, monkeypatch, capsys, caplog):
    """Runs one job of defend.py (or ``script``) in this process as its command line does: (exit code, stdout, stderr).

    With a ``number`` it is that job of a multirun.
    """
    from marginclip.experiment import command

    def job(*overrides, script="defend", number=None):
        config = make_config(tmp_path / "runs", *overrides, name=script)
        told = {"runtime.output_dir": str(tmp_path / "job")}
        if number is not None:
            told |= {"mode": RunMode.MULTIRUN, "job.num": number, "sweep.dir": str(tmp_path)}
        for key, value in told.items():
            OmegaConf.update(config, f"hydra.{key}", value, force_add=True)
        HydraConfig.instance().set_config(config)
        failures = []
        monkeypatch.setattr(command, "_failures", failures)
        command.TASKS[script](without_hydra(config))
        out, err = capsys.readouterr()
        assert not [record for record in caplog.records if record.exc_info], "a traceback was logged"
        return (1 if failures else 0), out, err

    return job


@pytest.fixture(scope="session")
def finished(tmp_path_factory, configure_at):
    """One complete tiny run, done once: (its runs_dir, its record). Tests must not write there."""
    from marginclip.experiment.run import defend

    runs_dir = tmp_path_factory.mktemp("finished") / "runs"
    return runs_dir, defend(configure_at(runs_dir))
