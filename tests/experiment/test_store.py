"""The store of victims: one place a recipe, saved whole and restored exactly."""

import pytest
import torch
from filelock import FileLock

from marginclip.attacks import AllToOne, BadNet
from marginclip.experiment.store import VictimStore

RECIPE = {
    "dataset": {"root": "data", "name": "digits", "cache": None, "download": True, "memory_gib": 4.0},
    "attack": {"rate": 0.1, "seed": 0, "min_success": 0.9},
    "model": {"blocks": [1, 1]},
    "seed": 0,
}


@pytest.fixture
def victim(tmp_path):
    return VictimStore(tmp_path).find("digits-badnet", RECIPE)


def test_a_victim_is_done_when_its_record_is_there(victim, net):
    assert victim.record is None
    victim.save(net, None, {"acc": 0.9})
    assert victim.record == {"acc": 0.9}


def test_weights_and_attack_come_back_exactly(victim, net, settle, images):
    attack, restored = (BadNet(AllToOne(4, target=0), (3, 8, 8), margin=1) for _ in range(2))
    restored.patch.zero_()
    expected = net(images)
    victim.save(net.to(memory_format=torch.channels_last), attack, {})
    with torch.no_grad():
        for value in net.parameters():
            value.zero_()
    victim.restore(net, restored)
    torch.testing.assert_close(net(images), expected)
    assert torch.equal(restored(images), attack(images))


def test_a_save_that_fails_leaves_no_record(victim, net):
    with pytest.raises(ValueError, match="JSON"):
        victim.save(net, None, {"asr": float("nan")})
    assert victim.record is None


def test_places_differ_by_recipe_and_begin_with_the_name(tmp_path):
    store = VictimStore(tmp_path)
    places = {store.find("a", recipe).folder for recipe in (RECIPE, RECIPE | {"seed": 1}, RECIPE)}
    assert len(places) == 2
    assert all(place.name.startswith("a-") and place.parent == tmp_path for place in places)


def test_one_process_at_a_time_trains(victim):
    with victim.lock(), pytest.raises(TimeoutError):
        FileLock(victim.folder / ".lock").acquire(timeout=0.01)
    with victim.lock():
        pass
