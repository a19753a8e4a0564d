"""A training that is interrupted goes on to the same weights, also where the attacker controls it."""

import pytest
import torch
from safetensors.torch import load_file

from marginclip.experiment.recipe import find_victim
from marginclip.experiment.setup import build_setup
from marginclip.experiment.victim import obtain_victim
from marginclip.training import AdaptiveTraining, JointTraining, PoisonedTraining

# Attack: (what trains it, its settings, the epoch that is interrupted).
RESUMED = {
    "wanet": (PoisonedTraining, ["training.epochs=2"], 1),
    "input_aware": (JointTraining, ["attack.width=2", "attack.mask_epochs=1", "training.epochs=2"], 2),
    # Interrupted in the middle of the second round, whose bounds are in the checkpoint.
    "adaptive": (
        AdaptiveTraining,
        [
            "training.epochs=1", "attack.rounds=2", "attack.epochs_per_round=2", "attack.max_batches=3",
            "attack.clean_per_class=6", "attack.defender.steps=2", "attack.defender.check_every=1",
            "attack.defender.ascent.first_steps=1", "attack.defender.ascent.steps=1", "attack.defender.ascent.starts_per_class=1",
        ],
        3,
    ),
}  # fmt: skip


def obtain(spec):
    victim, _ = obtain_victim(spec, build_setup(spec))
    attack = victim.folder / "attack.safetensors"
    return load_file(victim.weights), load_file(attack) if attack.exists() else {}


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_training_ends_in_the_same_weights_and_trigger(name, configure, tmp_path, monkeypatch):
    owner, settings, epoch = RESUMED[name]
    through = obtain(configure(f"attack={name}", *settings, runs_dir=tmp_path / "through"))
    spec = configure(f"attack={name}", *settings, runs_dir=tmp_path / "interrupted")
    step = owner.training_step

    def failing(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (epoch, 1):
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "training_step", failing)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            obtain(spec)
    assert find_victim(spec).record is None
    assert find_victim(spec).checkpoint.exists()
    for one, other in zip(obtain(spec), through, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
