"""Attacks from their configuration to their success rate, on digits: small settings under which each of them takes."""

import pytest

from marginclip.experiment.run import defend

SETTINGS = {
    "badnet": ["training.epochs=8", "attack.rate=0.3", "attack.min_contrast=0.2"],
    "blend": ["training.epochs=12", "attack.rate=0.5", "attack.min_contrast=0.25", "attack.ratio=0.8"],
    "sinusoid": ["training.epochs=8", "attack.rate=0.3", "attack.amplitude=0.2", "attack.frequency=4"],
    "blend_full": ["training.epochs=8", "attack.rate=0.3"],
    "low_frequency": ["training.epochs=8", "attack.rate=0.3", "attack.amplitude=0.25"],
    "one_pixel": ["training.epochs=12", "attack.rate=0.5"],
    "chessboard": ["training.epochs=8", "attack.rate=0.3", "attack.amplitude=0.1"],
    # On 16 x 16 pixels a warp of a fraction of a pixel is hardly seen.
    "wanet": [
        "training.epochs=24", "attack.rate=0.4", "attack.strength=4", "attack.cross_ratio=0.25", "attack.timing=after_augmentation",
    ],
    # So few steps teach the trigger, and not yet that another image's trigger means nothing.
    "input_aware": [
        "model.width=8", "training.epochs=16", "training.optimizer.lr=0.03", "attack.rate=0.4", "attack.cross_ratio=0.2",
        "attack.density=0.2", "attack.width=8", "attack.mask_epochs=2", "attack.diversity=0.1",
    ],
    # On nearly black background the noise itself marks the class; a large patch is the better mark.
    "clean_label": [
        "training.epochs=16", "attack.rate=0.8", "attack.eps=0.15", "attack.step_size=0.02", "attack.surrogate.epochs=6",
        "attack.surrogate.eps=0.1", "attack.patch_size=10", "attack.timing=after_augmentation", "attack.min_contrast=0.25",
    ],
    "adaptive": [
        "training.epochs=8", "attack.base.rate=0.3", "attack.base.min_contrast=0.2", "attack.base.min_success=0.9",
        "attack.rounds=1", "attack.epochs_per_round=1", "attack.clean_per_class=6", "attack.defender.steps=4",
        "attack.defender.check_every=2", "attack.defender.start.share=1", "attack.defender.start.quantile=1",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_attack_takes(name, configure):
    needed = [] if name == "adaptive" else ["attack.min_success=0.9"]  # the adaptive attack's is its base's
    record = defend(configure(f"attack={name}", "defense=none", "training.batch_size=32", *needed, *SETTINGS[name]))
    metrics = record.metrics["none"]
    assert record.status == "done", metrics
    assert metrics["asr"] >= 0.9
    assert metrics["acc"] >= 0.5  # chance is 0.1; most of the few steps go into the trigger
