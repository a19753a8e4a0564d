"""``training=finetune``: the trigger is planted in a few epochs into a classifier that was good before."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from marginclip.errors import UserError
from marginclip.experiment.recipe import find_victim, run_folder
from marginclip.experiment.setup import build_setup
from marginclip.experiment.victim import obtain_victim

FINETUNE = ["training=finetune", "training.base.epochs=2", "training.epochs=1"]


@pytest.fixture
def weights(configure):
    """The trained weights of a run's victim, and the record beside them."""

    def weights(*overrides):
        spec = configure(*overrides)
        victim, _ = obtain_victim(spec, build_setup(spec))
        return load_file(victim.weights), json.loads((victim.folder / "victim.json").read_text())

    return weights


def test_it_starts_from_the_clean_victim_of_the_same_run(configure, weights):
    clean, _ = weights("attack=none")
    # So small a rate leaves the weights where they started; the scratch victim shows that this is no accident.
    tuned, record = weights("attack=one_pixel", *FINETUNE, "training.optimizer.lr=1e-9", "training.optimizer.weight_decay=0")
    scratch, _ = weights("attack=one_pixel")
    trained = [name for name, value in clean.items() if value.is_floating_point() and "running" not in name]
    for name in trained:
        torch.testing.assert_close(tuned[name], clean[name], rtol=0, atol=1e-5)
    assert max(float((scratch[name] - clean[name]).abs().max()) for name in trained) > 0.01
    assert record["recipe"]["training"]["start_from"] == "clean"
    assert len(list(find_victim(configure("attack=none")).folder.parent.glob("*/victim.json"))) == 3


def test_it_plants_the_trigger_and_keeps_the_accuracy(weights):
    _, record = weights(
        "attack=blend_full", "attack.rate=0.3", "model.width=8", "training=finetune", "training.base.epochs=10", "training.epochs=6",
        "training.batch_size=32", "training.optimizer.lr=0.05",
    )  # fmt: skip
    assert record["metrics"]["asr"] > 0.9
    assert record["metrics"]["acc"] > 0.8


def test_it_starts_from_a_file_and_another_content_is_another_victim(configure, weights, tmp_path):
    state, _ = weights("attack=none")
    file = tmp_path / "given.safetensors"
    save_file(state, file)
    settings = ["attack=one_pixel", *FINETUNE, f"training.start_from={file}", "training.optimizer.lr=1e-9"]
    before = find_victim(configure(*settings)).folder
    tuned, _ = weights(*settings)
    name = next(name for name in state if name.endswith("linear.weight"))
    torch.testing.assert_close(tuned[name], state[name], rtol=0, atol=1e-5)
    save_file({name: value + 1 for name, value in state.items()}, file)
    assert find_victim(configure(*settings)).folder != before


def test_another_content_of_the_start_is_another_run(configure, tmp_path):
    file = tmp_path / "given.safetensors"
    folders = []
    for value in (0.0, 1.0):
        save_file({"weight": torch.full((1,), value)}, file)
        folders.append(run_folder(configure("attack=one_pixel", *FINETUNE, f"training.start_from={file}")))
    assert folders[0] != folders[1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.base=null", "training.start_from=clean needs training.base"),
        ("training.start_from=3", "training.start_from must be clean, a file of weights or null, got 3"),
        ("training.base.epochs=0", "training.base.epochs must be a whole number from 1 up, got 0"),
        ("training.start_from=no/file.pt", "training.start_from='no/file.pt' is not a file"),
    ],
)
def test_a_start_that_cannot_be_is_one_sentence(weights, setting, message):
    with pytest.raises(UserError, match=message):
        weights("attack=one_pixel", "training=finetune", setting)


def test_victims_of_other_trainings_keep_their_place(configure):
    recipe = find_victim(configure("attack=one_pixel")).folder.name
    assert recipe == find_victim(configure("attack=one_pixel", "+training.start_from=null")).folder.name
