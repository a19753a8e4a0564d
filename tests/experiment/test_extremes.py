"""The most extreme images of a detector, against a choice by hand."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from marginclip.experiment.extremes import MOST, extreme_images, small
from marginclip.experiment.run import defend


def test_small_images_are_means_of_squares_and_never_enlarged():
    images = torch.rand(2, 3, 96, 48)
    shrunk = small(images)
    assert shrunk.shape == (2, 3, 48, 24)
    by_hand = images.reshape(2, 3, 48, 2, 24, 2).mean((3, 5))
    assert (shrunk / 255 - by_hand).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(small(images[..., :16, :16]), (255 * images[..., :16, :16]).round().byte())


@pytest.fixture
def finished(configure):
    return defend(configure("defense=mmdf", "defense.detector.folds=0"))


def test_a_run_saves_its_most_extreme_images_and_the_outcome_of_each(finished):
    arrays = load_file(finished.folder / "arrays.safetensors")
    scores = {kind: arrays[f"scores/mmdf_{kind}"] for kind in ("clean", "triggered")}
    assert arrays["outcomes/mmdf/clean_correct"].shape == scores["clean"].shape
    assert arrays["outcomes/mmdf_repaired/triggered_success"].shape == scores["triggered"].shape
    assert not any(name.startswith("outcomes/mmdf_both/") for name in arrays), "another statistic, to which no scores are saved"
    threshold = finished.detector["threshold"]
    missed = sorted(value for value in scores["triggered"].tolist() if value < threshold)[:MOST]
    alarms = sorted((value for value in scores["clean"].tolist() if value >= threshold), reverse=True)[:MOST]
    for group, wanted in (("missed", missed), ("false_alarms", alarms)):
        found = arrays.get(f"extremes/mmdf/{group}/statistic", torch.empty(0))
        assert found.tolist() == wanted
    shown = arrays["extremes/mmdf/missed/images"]
    assert shown.dtype == torch.uint8 and shown.shape == (len(missed), *arrays["examples/clean"].shape[1:])


def test_triggered_images_are_shown_with_their_trigger_and_clean_ones_without():
    """Ten images of grey 0 to 0.9, of which the attack on odd classes paints the last one white."""
    images = torch.arange(10).view(10, 1, 1, 1).mul(25).byte().expand(10, 3, 2, 2)
    labels = torch.arange(10)
    attack = SimpleNamespace(x2x=SimpleNamespace(eligible=lambda labels: labels % 2 == 1), cpu=lambda: torch.ones_like)
    held_out = SimpleNamespace(images=images, labels=labels)
    setup = SimpleNamespace(
        splits=SimpleNamespace(held_out=held_out), attack=attack, data=SimpleNamespace(eval_index=torch.arange(2, 10))
    )
    scores = {"clean": torch.arange(8.0), "triggered": torch.tensor([5.0, 1.0, 9.0, 0.0])}
    flagged = {"clean": torch.tensor([0, 1, 0, 0, 0, 0, 0, 1]).bool(), "triggered": torch.tensor([1, 0, 1, 0]).bool()}
    found = extreme_images(setup, "mmdf", scores, flagged)
    assert found["extremes/mmdf/false_alarms/labels"].tolist() == [9, 3]
    assert found["extremes/mmdf/false_alarms/images"][:, 0, 0, 0].tolist() == [225, 75]
    assert found["extremes/mmdf/caught/labels"].tolist() == [7, 3]
    assert found["extremes/mmdf/caught/images"].unique().tolist() == [255]
    assert found["extremes/mmdf/missed/labels"].tolist() == [9, 5]
    assert found["extremes/mmdf/missed/statistic"].tolist() == [0, 1]
