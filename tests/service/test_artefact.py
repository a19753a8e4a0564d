"""An artefact keeps a repair: the same decisions after loading, and a clear refusal of what does not belong together."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from marginclip.api import repair
from marginclip.defenses import MMOM, AscentPlan, Auto, MMACFineTune, StaticClip
from marginclip.errors import UserError
from marginclip.maxmargin import MaximumMarginTest
from marginclip.service import Artefact, model_digest, read_artefact

from .conftest import quarters, trained, triggered


def same(one, other, images):
    first, second = one(images), other(images)
    for name in ("decisions", "flagged", "p_values", "statistic"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_a_loaded_artefact_decides_the_same(artefact, poisoned, tmp_path):
    loaded = Artefact.load(artefact.save(tmp_path / "kept"), poisoned)
    images, _ = quarters(40, seed=3)
    same(artefact, loaded, torch.cat([images, triggered(images)]))
    assert loaded.classes == artefact.classes
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["artefact.json", "artefact.safetensors"]
    described = read_artefact(tmp_path / "kept")
    assert (described.method, described.clean_images, described.changes_weights) == ("MMAC", 80, False)
    assert 0.9 < described.accuracy <= 1
    assert described.threshold == pytest.approx(artefact.detector.threshold)


@pytest.mark.parametrize("kind", ["weights", "offsets"])
def test_repairs_with_weights_or_offsets_are_kept_whole(poisoned, clean, short, tmp_path, kind):
    defense = (
        MMACFineTune(mmac=lambda seed: short, epochs=1, ascent=AscentPlan(starts_per_class=2, refresh_every=1))
        if kind == "weights"
        else MMOM(steps=4, check_every=2)
    )
    made = Artefact.fit(poisoned, *clean, defense=defense)
    loaded = Artefact.load(made.save(tmp_path / "kept"), poisoned)
    images, _ = quarters(40, seed=3)
    torch.testing.assert_close(loaded.network(images), made.network(images), rtol=0, atol=0)
    assert read_artefact(tmp_path / "kept").changes_weights == (kind == "weights")


def test_labels_can_be_int32(artefact, poisoned, clean, short):
    images, labels = clean
    same(artefact, Artefact.fit(poisoned, images, labels.int(), defense=short), images)


def test_images_of_another_size_are_refused(artefact):
    for shape in ((1, 9, 8), (3, 8, 8)):
        shown = " x ".join(map(str, shape))
        with pytest.raises(UserError, match=rf"images must be of 1 x 8 x 8 \(channels, height, width\), .*, got {shown}"):
            artefact(torch.rand(2, *shape))


def test_the_digest_is_that_of_the_weights(poisoned, honest):
    again = trained(poisoned=True)
    assert model_digest(again) == model_digest(poisoned) != model_digest(honest)
    again[1].num_batches_tracked += 1
    assert model_digest(again.to(memory_format=torch.channels_last)) == model_digest(poisoned)
    with torch.no_grad():
        again[7].bias[0] += 1e-6
    assert model_digest(again) != model_digest(poisoned)


def test_another_model_is_refused(artefact, honest, tmp_path):
    folder = artefact.save(tmp_path / "kept")
    with pytest.raises(
        UserError, match=r"was made for another model: its digest is [0-9a-f]{12}, that of the given model [0-9a-f]{12}"
    ):
        Artefact.load(folder, honest)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "artefact.json").unlink(), "is no artefact: it has no artefact.json"),
        (lambda folder: (folder / "artefact.json").write_text("{"), "is damaged or of another version"),
        (lambda folder: (folder / "artefact.safetensors").unlink(), "lacks its file"),
        (
            lambda folder: (folder / "artefact.safetensors").write_bytes((folder / "artefact.safetensors").read_bytes()[:-8]),
            "is damaged or does not belong to the artefact.json beside it",
        ),
    ],
)
def test_what_is_not_whole_is_refused(artefact, poisoned, tmp_path, spoil, message):
    folder = artefact.save(tmp_path / "kept")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        Artefact.load(folder, poisoned)


@pytest.mark.parametrize(
    "change",
    [
        {"image_shape": [3, 10**6, 10**6]},
        {"detector": {"theta": 0.005, "null_distribution": "tail", "rule": "paper", "correction": "exclude", "code": "x"}},
        {"detector": {"theta": 0.005}},
        {"further": 1},
        {"classes": 4},
    ],
)
def test_a_tampered_description_is_refused(artefact, poisoned, tmp_path, change):
    folder = artefact.save(tmp_path / "kept")
    content = json.loads((folder / "artefact.json").read_text()) | change
    (folder / "artefact.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is damaged or of another version"):
        Artefact.load(folder, poisoned)


def test_an_artefact_detects_by_both_statistics_and_one_of_before_by_the_drop(artefact, poisoned, tmp_path):
    folder = artefact.save(tmp_path / "kept")
    assert Artefact.load(folder, poisoned).detector.statistic == artefact.detector.statistic == "both"
    content = json.loads((folder / "artefact.json").read_text())
    del content["detector"]["statistic"]
    (folder / "artefact.json").write_text(json.dumps(content))
    before = Artefact.load(folder, poisoned).detector
    assert before.statistic == "drop"
    assert torch.equal(before.clean_statistics, artefact.detector.clean_drops)


def test_an_artefact_of_a_later_version_is_refused(artefact, poisoned, tmp_path):
    folder = artefact.save(tmp_path / "kept")
    content = json.loads((folder / "artefact.json").read_text()) | {"schema_version": 9}
    (folder / "artefact.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="of another version"):
        Artefact.load(folder, poisoned)


def test_an_automatic_choice_that_finds_nothing_says_so(honest, clean):
    auto = Auto(mmom=partial(MMOM, steps=2, check_every=1), detection=partial(MaximumMarginTest, starts=1, steps=2, alpha=1e-9))
    with pytest.raises(
        UserError, match=r"automatic choice leaves this model without bounds \(no fault shows: .*\), and an artefact keeps"
    ):
        Artefact.fit(honest, *clean, defense=auto)


def test_an_artefact_without_facts_decides_and_is_not_saved(artefact, clean, tmp_path):
    bare = replace(artefact, facts={})
    same(artefact, bare, clean[0])
    with pytest.raises(
        UserError, match=r"it lacks method, clean_images, accuracy, repaired_accuracy as artefact.json holds them"
    ):
        bare.save(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model_pth": "x"}, TypeError, "model_pth"),
        ({"detector": {"theta": 5}}, UserError, r"detector.theta must be in \(0, 1\), got 5"),
        ({"detector": {"tetha": 0.1}}, UserError, "unknown setting detector.tetha; did you mean 'theta'?"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_repaired(poisoned, clean, monkeypatch, settings, error, message):
    monkeypatch.setattr(StaticClip, "fit", lambda *_, **__: pytest.fail("a repair was made"))
    with pytest.raises(error, match=message):
        Artefact.fit(poisoned, *clean, defense=StaticClip(), **settings)


def test_a_repair_without_bounds_cannot_be_kept(poisoned, clean):
    from marginclip.defenses import FineTune

    with pytest.raises(UserError, match="fine-tuning does not bound activations"):
        Artefact.fit(poisoned, *clean, defense=FineTune(epochs=1))
    with pytest.raises(UserError, match="logits of 4 classes, not of 3"):
        Artefact.fit(poisoned, *clean, defense=StaticClip(), classes=("a", "b", "c"))


def test_a_model_in_double_precision_goes_all_the_way(poisoned, clean, short, tmp_path):
    model, (images, labels) = copy.deepcopy(poisoned).double(), clean
    made = Artefact.fit(model, images.double(), labels, defense=short)
    loaded = Artefact.load(made.save(tmp_path / "kept"), model)
    same(made, loaded, images.double())


def test_folds_are_checked_before_anything_is_learned(poisoned, clean, short, monkeypatch):
    monkeypatch.setattr(type(short), "fit", lambda *_, **__: pytest.fail("a repair ran"))
    images, labels = clean
    first = torch.stack([(labels == label).nonzero()[0, 0] for label in range(4)])
    for given, folds, told in (
        (clean, 1, "at least 2 folds, got 1"),
        ((images[first], labels[first]), 2, "at least 2 clean images"),
    ):
        with pytest.raises(UserError, match=told):
            Artefact.fit(poisoned, *given, defense=short, folds=folds)
    with pytest.raises(UserError, match="at least 2 clean images of a class"):
        repair(poisoned, images[first], labels[first], defense=short)
