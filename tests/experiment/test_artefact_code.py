"""An artefact from somebody else runs no code of theirs: whatever its settings name, and however deep, is refused before it is imported."""

import json
from pathlib import Path

import pytest
import yaml

from marginclip.errors import UserError
from marginclip.experiment.artefact_commands import OWN_MODELS, main, open_artefact
from marginclip.service.artefact import Description

CODE = """
from pathlib import Path

Path(__file__).with_name("ran").touch()


def factory(**_):
    return 3
"""
OURS = "marginclip.models."
RESNET, TIMM = OURS + "ResNet", OURS + "timm_model"


@pytest.fixture
def evil(tmp_path):
    """A file of code that tells when it ran, as ``evil.py`` in the test's folder; gives the settings that run it."""
    (tmp_path / "evil.py").write_text(CODE)
    return {"_target_": OURS + "imported_model", "num_classes": 3, "target": f"{tmp_path / 'evil.py'}:factory"}


def artefact(folder, model):
    """The folder of an artefact of that model, as far as it is read before the model is made."""
    detector = {"theta": 0.005, "null_distribution": "normal", "rule": "changed", "correction": "none"}
    content = Description(
        method="mmdf", classes=["a", "b", "c"], image_shape=(3, 8, 8), model=model, model_path=str(folder / "model.safetensors"),
        model_digest="", tensors_digest="", sites=[], channel_axis=1, changes_weights=False, detector=detector, threshold=None,
        clean_images=3, accuracy=1.0, repaired_accuracy=1.0,
    )  # fmt: skip
    (folder / "model.safetensors").write_text("")
    (folder / "artefact.json").write_text(json.dumps(content.model_dump(mode="json")))
    return str(folder)


@pytest.mark.parametrize(
    "nest",
    [
        lambda evil: {"_target_": RESNET, "blocks": evil},
        lambda evil: {"_target_": RESNET, "blocks": [1, evil]},
        lambda evil: {"_target_": RESNET, "blocks": [[{"deep": {"name": evil}}]]},
        lambda evil: {"_target_": RESNET, "mean": {"_args_": [evil]}},
        lambda evil: {"_target_": RESNET, "_args_": [evil]},
        lambda evil: {"_target_": TIMM, "arguments": {"block": evil}},
        lambda evil: {"_target_": RESNET, "blocks": f"${{oc.create:{json.dumps(evil)}}}"},
        lambda evil: {"_target_": OURS + "imported_model", "target": evil["target"]},
    ],
)
def test_nested_code_does_not_run(tmp_path, evil, nest, capsys):
    folder = artefact(tmp_path, nest(evil))
    assert main("scan", [folder, "x.png"]) == 1
    error = capsys.readouterr().err
    assert "--trust-code" in error and error.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_nested_code_runs_where_that_is_allowed(tmp_path, evil):
    with pytest.raises(UserError, match=r"must make a torch\.nn\.Module"):
        open_artefact(artefact(tmp_path, {"_target_": RESNET, "blocks": evil}), trust_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ({"_target_": OURS + "exported_model", "path": "model.pt2", "trust": True}, "exported_model"),
        (
            {"_target_": RESNET, "blocks": [{"_target_": OURS + "exported_model", "path": "model.pt2", "trust": True}]},
            "_target_",
        ),
        ({"_target_": RESNET, "_partial_": True}, "_partial_"),
        ({"_target_": RESNET, "mean": ["${oc.env:HOME}"]}, "${oc.env:HOME}"),
        ({"_target_": TIMM, "arguments": {"checkpoint_path": "theirs.pth"}}, "checkpoint_path"),
        ({"_target_": TIMM, "arguments": {"pretrained_cfg": {"file": "theirs.pth"}}}, "pretrained_cfg"),
    ],
)
def test_what_could_run_or_load_more_is_named(tmp_path, model, word):
    with pytest.raises(UserError) as caught:
        open_artefact(artefact(tmp_path, model))
    assert f"{word}'" in str(caught.value) and "--trust-code" in str(caught.value)


def test_plain_settings_are_taken(tmp_path):
    """As far as the weights, which this artefact lacks."""
    with pytest.raises(UserError, match="is no complete safetensors file"):
        open_artefact(artefact(tmp_path, {"_target_": RESNET, "name": "small", "blocks": [1], "width": 4, "mean": None}))


def test_every_model_of_ours_that_runs_no_other_code_needs_no_trust():
    conf = Path(__file__).parents[2] / "conf" / "model"
    options = {path.stem: yaml.safe_load(path.read_text()) for path in conf.glob("*.yaml")}
    targets = {name: option["_target_"] for name, option in options.items()}
    assert {name for name, target in targets.items() if target not in OWN_MODELS} == {"exported", "import"}
