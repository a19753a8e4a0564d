"""Sweeps in two stages: the distinct victims, each once, then the cells that need them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from marginclip.experiment import victims_first
from marginclip.experiment.victims_first import asked_cells, first_stage, needed_victims, note

ROOT = Path(__file__).parents[2]
SMALL = ["dataset=digits", "trainer=exact", "model.width=4", "logger=none"]


@pytest.fixture
def sweep(tmp_path):
    """Makes the configuration of a sweep as Hydra hands it to callbacks, in its surroundings."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):

        def sweep(*overrides):
            given = [*SMALL, f"runs_dir={tmp_path}", *overrides]
            config = compose(
                "defend", [text for text in given if "[" in text or not {",", "("} & {*text}], return_hydra_config=True
            )
            with open_dict(config):
                config.hydra.overrides.task = given
                config.hydra.job.config_name = "defend"
                config.hydra.runtime.config_sources = []
            return config

        yield sweep


def test_cells_are_those_of_hydras_sweeper_in_its_order(sweep):
    cells = asked_cells(sweep("attack=badnet,blend", "seed=range(2)", "model.mean=[0.1,0.2]"))
    assert [cell[-3:] for cell in cells] == [
        [f"attack={attack}", f"seed={seed}", "model.mean=[0.1,0.2]"] for attack in ("badnet", "blend") for seed in (0, 1)
    ]


def test_a_sweep_notes_the_cells_that_it_asks_for(sweep, tmp_path):
    note(tmp_path / "new", asked_cells(sweep("attack=badnet,blend")), "train")
    noted = json.loads((tmp_path / "new" / "sweep.json").read_text())
    asked = noted["asked"]
    assert noted["command"] == "train"
    assert [cell.split()[-1] for cell in asked] == ["attack=badnet", "attack=blend"]


def test_what_an_experiment_sweeps_is_part_of_the_cells(sweep):
    config = sweep("seed=0,1")
    with open_dict(config):
        config.hydra.sweeper.params = {"defense": "mmac,static_clip"}
    assert [[cell[0], cell[-1]] for cell in asked_cells(config)] == [
        [f"defense={defense}", f"seed={seed}"] for defense in ("mmac", "static_clip") for seed in (0, 1)
    ]


def test_the_first_stage_has_every_victim_once(sweep):
    config = sweep("attack=badnet,none", "defense=mmac,none", "seed=3,4")
    cells = asked_cells(config)
    stage = first_stage(config, cells)
    assert len(cells) == 8
    assert [cell[4:] for cell in stage] == [
        [f"runs_dir={stage[0][4].partition('=')[2]}", f"attack={attack}", "defense=mmac", f"seed={seed}"]
        for attack in ("badnet", "none")
        for seed in (3, 4)
    ]


def test_no_stage_where_no_two_cells_share_a_victim(sweep):
    config = sweep("seed=0,1")
    cells = asked_cells(config)
    assert len({victim for _, victim in needed_victims(config, cells)}) == 2
    assert first_stage(config, cells) == []


def test_trained_victims_given_checkpoints_and_wrong_cells_need_no_stage(sweep, tmp_path):
    config = sweep("defense=mmac,static_clip", "seed=0,1")
    cells = asked_cells(config)
    trained = {victim for cell, victim in needed_victims(config, cells) if "seed=0" in cell}
    for victim in trained:
        victim.mkdir(parents=True)
        (victim / "victim.json").write_text("{}")
    assert {cell[-1] for cell in first_stage(config, cells)} == {"seed=1"}
    config = sweep("victim=checkpoint", "victim.path=a.pt", "defense=mmac,static_clip")
    assert first_stage(config, asked_cells(config)) == []
    config = sweep("training.epochs=0", "defense=mmac,static_clip")
    assert first_stage(config, asked_cells(config)) == []


class Recorded:
    """A launcher that notes what it is asked to launch."""

    def __init__(self):
        self.launched = []

    def launch(self, overrides, initial_job_idx):
        self.launched.append((overrides, initial_job_idx))


@pytest.fixture
def launcher(monkeypatch):
    made = Recorded()
    monkeypatch.setattr(victims_first.Plugins.instance(), "instantiate_launcher", lambda **kwargs: made)
    return made


def of_launcher(config, target):
    with open_dict(config):
        config.hydra.launcher = {"_target_": target, "additional_parameters": {}}
    return config


def test_other_launchers_wait_for_the_victims(sweep, launcher):
    config = of_launcher(sweep("seed=0"), "hydra_plugins.x.JoblibLauncher")
    victims_first.launch(config, [["seed=0"], ["seed=1"]])
    assert launcher.launched == [([["seed=0", victims_first.SUBDIR], ["seed=1", victims_first.SUBDIR]], 0)]


@pytest.mark.parametrize("given", [None, "singleton"])
def test_on_slurm_the_cells_depend_on_the_array_of_victims(sweep, launcher, monkeypatch, given):
    config = of_launcher(sweep("seed=0"), "hydra_plugins.x.SlurmLauncher")
    if given is not None:
        OmegaConf.update(config, "hydra.launcher.additional_parameters.dependency", given, force_add=True)
    submitted = []
    monkeypatch.setitem(
        sys.modules,
        "marginclip.experiment.slurm",
        SimpleNamespace(submit=lambda launcher, overrides: submitted.append(overrides) or "41"),
    )
    victims_first.launch(config, [["seed=0"]])
    assert submitted == [[["seed=0", victims_first.SUBDIR]]]
    assert launcher.launched == []
    expected = "afterany:41" if given is None else "singleton,afterany:41"
    assert config.hydra.launcher.additional_parameters.dependency == expected


def test_submitting_hands_the_launchers_settings_to_slurm(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from marginclip.experiment.slurm import submit

    seen = {}

    class Executor:
        def __init__(self, **settings):
            seen["made"] = settings

        def update_parameters(self, **settings):
            seen["parameters"] = settings

        def map_array(self, function, *columns):
            seen["jobs"] = list(zip(*columns, strict=True))
            return [SimpleNamespace(job_id=f"12_{number}") for number in range(len(seen["jobs"]))]

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}})
    params = {"submitit_folder": "f", "max_num_timeout": 20, "timeout_min": 5, "partition": "gpu", "additional_parameters": {}}
    assert submit(SimpleNamespace(config=config, params=params), [["seed=0"], ["seed=1"]]) == "12"
    assert seen["made"] == {"cluster": "slurm", "folder": "f", "slurm_max_num_timeout": 20}
    assert seen["parameters"] == {"timeout_min": 5, "slurm_partition": "gpu", "slurm_additional_parameters": {}}
    assert [job[:3] for job in seen["jobs"]] == [(["seed=0"], "hydra.sweep.dir", 0), (["seed=1"], "hydra.sweep.dir", 1)]
