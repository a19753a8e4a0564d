"""``marginclip audit``, ``repair``, ``scan`` and ``export`` as they are typed, one after the other, on a checkpoint and folders."""

import csv
import json

import pytest
import torch
from PIL import Image

from marginclip.cli import _as_options
from marginclip.errors import UserError
from marginclip.experiment import artefact_commands
from marginclip.experiment.setup import build_setup
from marginclip.experiment.victim import obtain_victim

BAD = [
    "attack=blend_full",
    "attack.rate=0.3",
    "model.width=8",
    "training.epochs=10",
    "training.batch_size=32",
    "training.optimizer.lr=0.05",
]
QUICK = [
    "dataset=image_folder", "dataset.grey=true", "victim=checkpoint", "model=small_resnet", "model.width=8",
    "defense.steps=10", "defense.extra_steps=0", "detect.starts=2", "detect.steps=5", "trainer.threads=1",
]  # fmt: skip


def write_images(folder, images, prefix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(folder / f"{prefix}{number:03}.png")


@pytest.fixture(scope="module")
def handed(tmp_path_factory, configure_at):
    """A folder with a poisoned model's weights, clean images of its classes, and images from use, twenty of them triggered."""
    folder = tmp_path_factory.mktemp("handed")
    spec = configure_at(folder / "runs", *BAD)
    setup = build_setup(spec)
    victim, _ = obtain_victim(spec, setup)
    (folder / "model.safetensors").write_bytes(victim.weights.read_bytes())
    held_out = setup.splits.held_out
    for label, name in enumerate(held_out.classes):
        rows = (held_out.labels == label).nonzero().flatten()
        images = held_out.images[rows].float() / 255
        write_images(folder / "clean" / name, images[:20])
        write_images(folder / "use", images[20:24], prefix=f"clean{label}-")
        if label != setup.target_class:
            write_images(folder / "use", setup.attack(images[24:27]), prefix=f"triggered{label}-")
    return folder, setup.target_class


@pytest.fixture(scope="module")
def repaired(handed, tmp_path_factory, configure_at):
    """The folder of the artefact that ``marginclip repair`` writes."""
    from marginclip.experiment.handed_over import repair_model

    folder, _ = handed
    output = tmp_path_factory.mktemp("repaired")
    overrides = [f"victim.path={folder / 'model.safetensors'}", f"dataset.root={folder / 'clean'}", "defense=mmdf", *QUICK]
    spec = configure_at(output / "runs", *[text for text in overrides if "detect." not in text], "clean_per_class=null")
    told = repair_model(spec, output=str(output / "kept"), tolerance=100.0, json=True)
    assert json.loads(told)["accuracy"] > 80
    return output / "kept"


def test_the_audit_names_the_target_and_writes_its_report(handed, tmp_path, configure_at):
    from marginclip.experiment.handed_over import audit_model

    folder, target = handed
    overrides = [
        f"victim.path={folder / 'model.safetensors'}",
        f"dataset.root={folder / 'clean'}",
        "detect=mmbd",
        "defense=mmdf",
        *QUICK,
    ]
    spec = configure_at(tmp_path / "runs", *overrides, "clean_per_class=null")
    suspicious, told = audit_model(spec, output=str(tmp_path / "out"), images_suspect=str(folder / "use"), json=False)
    content = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert content["reach"]["suspect"] == target
    assert suspicious == (content["verdict"]["kind"] != "nothing")
    assert content["suspicious_images"]["images"] == 40 + 27
    assert told.startswith(content["verdict"]["headline"])
    assert "not tested:" in told
    assert (tmp_path / "out" / "audit.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("defense", ["finetune", "mmom", "auto", "none"])
def test_an_audit_by_another_repair_than_mmac_is_refused_before_anything_is_read(tmp_path, configure_at, defense):
    from marginclip.experiment.handed_over import audit_model

    words = ["dataset=image_folder", "dataset.root=absent", "victim=checkpoint", "victim.path=absent.pt", f"defense={defense}"]
    with pytest.raises(UserError) as caught:
        audit_model(configure_at(tmp_path / "runs", *words), output=str(tmp_path / "out"), images_suspect=None, json=False)
    assert str(caught.value) == f"marginclip audit repairs by MMAC: defense must be mmdf or mmac, got {defense}"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("detect=none", "marginclip audit tests by MM-BD: detect must be mmbd, got none"),
        ("defense.detector.folds=0", "defense.detector.folds must be at least 2, got 0: an audit judges each image"),
    ],
)
def test_an_audit_refuses_settings_that_it_cannot_follow(tmp_path, configure_at, word, message):
    from marginclip.experiment.handed_over import audit_model

    words = [
        "dataset=image_folder",
        "dataset.root=absent",
        "victim=checkpoint",
        "victim.path=absent.pt",
        "detect=mmbd",
        "defense=mmdf",
    ]
    with pytest.raises(UserError, match=message):
        audit_model(configure_at(tmp_path / "runs", *words, word), output=str(tmp_path), images_suspect=None, json=False)


def test_a_repair_refuses_a_detector_without_folds(tmp_path, configure_at):
    from marginclip.experiment.handed_over import repair_model

    words = [
        "dataset=image_folder",
        "dataset.root=absent",
        "victim=checkpoint",
        "victim.path=absent.pt",
        "defense/detector=paper",
    ]
    with pytest.raises(UserError, match=r"defense.detector.folds must be at least 2, got 0: threshold and accuracy"):
        repair_model(configure_at(tmp_path / "runs", *words), output=str(tmp_path / "kept"), tolerance=None, json=False)


@pytest.mark.parametrize(("script", "does"), [("repair", "repair_model"), ("audit", "audit_model")])
def test_each_run_of_a_sweep_writes_to_a_folder_of_its_own(tmp_path, job, monkeypatch, script, does):
    from marginclip.experiment import handed_over

    written = []
    monkeypatch.setattr(handed_over, does, lambda *_, output, **__: written.append(output) or (False, "told"))
    words = ["dataset=image_folder", "dataset.root=absent", "victim.path=absent.pt", f"output={tmp_path / 'kept'}"]
    for number in (None, 0, 1):
        assert job(*words, script=script, number=number)[0] == 0
    assert written == [str(tmp_path / name) for name in ("kept", "kept/0", "kept/1")]


def test_the_audit_is_given_the_detector_and_the_folds(theirs, tmp_path, configure_at, monkeypatch):
    from marginclip.experiment import handed_over

    given = {}

    def note(*_, **settings):
        given.update(settings)
        raise UserError("enough")

    monkeypatch.setattr(handed_over, "audit", note)
    folder, _ = theirs
    words = [
        "dataset=image_folder", "dataset.grey=true", "victim=checkpoint", f"victim.path={folder / 'checkpoint.pth'}",
        f"dataset.root={folder / 'clean'}", "model=import", f"model.target={folder / 'nets.py'}:plain", "trainer.threads=1",
        "detect=mmbd", "defense=mmdf", "defense.detector.theta=0.01", "defense.detector.folds=3", "defense.detector.rule=or_disagree",
    ]  # fmt: skip
    with pytest.raises(UserError, match="enough"):
        handed_over.audit_model(configure_at(tmp_path / "runs", *words), output=str(tmp_path), images_suspect=None, json=False)
    assert given["folds"] == 3
    assert given["detector"] == {
        "theta": 0.01, "null_distribution": "tail", "statistic": "drop", "rule": "or_disagree", "correction": "exclude"
    }  # fmt: skip


def test_scanning_writes_a_row_for_every_image_and_a_summary(handed, repaired, tmp_path, capsys):
    folder, _ = handed
    (folder / "use" / "broken.png").write_text("no image")
    try:
        assert artefact_commands.main("scan", [str(repaired), str(folder / "use"), "--output", str(tmp_path / "rows.csv")]) == 0
    finally:
        (folder / "use" / "broken.png").unlink()
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(rows) == 68
    assert [row["error"][:12] for row in rows if row["error"]] == ["not a readab"]
    summary = capsys.readouterr().err
    assert summary.startswith("67 images, ")
    assert "1 files could not be used" in summary
    assert "no flag is no proof" in summary


def test_names_can_come_from_the_standard_input_and_rows_be_json(handed, repaired, capsys, monkeypatch):
    import io

    folder, _ = handed
    names = sorted((folder / "use").iterdir())[:3]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, names)) + "\n"))
    assert artefact_commands.main("scan", [str(repaired), "-", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["path"] for line in out.splitlines()] == [str(name) for name in names]
    assert json.loads(err)["images"] == 3


def test_the_export_decides_as_the_scan(handed, repaired, tmp_path, capsys):
    folder, _ = handed
    file = tmp_path / "mmdf.pt2"
    assert artefact_commands.main("export", [str(repaired), "format=pt2", f"output={file}"]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    assert artefact_commands.main("scan", [str(repaired), str(folder / "use"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    import numpy as np

    images = torch.stack([torch.from_numpy(np.array(Image.open(row["path"]))).unsqueeze(0).float() / 255 for row in rows])
    decisions, flagged, _ = torch.export.load(file).module()(images)
    assert [row["flagged"] for row in rows] == flagged.tolist()
    assert [row["corrected"] for row in rows] == [str(label) for label in decisions.tolist()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "absent", "x.png"], "'absent' is no artefact"),
        (["scan", "ARTEFACT", "x.png", "--model", "absent.pt"], "the model 'absent.pt' of the artefact"),
        (["scan", "ARTEFACT", "absent-folder"], "no image could be used"),
        (["export", "ARTEFACT"], "export needs output=FILE"),
        (["export", "ARTEFACT", "output=x", "size=3"], "unknown option 'size'"),
        (
            ["export", "ARTEFACT", "output=x", "batch_size=two"],
            "batch_size must be a whole number, got 'two'",
        ),
        (["export", "ARTEFACT", "output=x", "format=tflite"], "format must be one of"),
    ],
)
def test_mistakes_are_one_sentence(repaired, arguments, message, capsys):
    command, *rest = [str(repaired) if word == "ARTEFACT" else word for word in arguments]
    assert artefact_commands.main(command, rest) == 1
    assert f"error: {message}" in capsys.readouterr().err


def test_another_model_is_refused(handed, repaired, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder, _ = handed
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: value + 1 if value.is_floating_point() else value for name, value in state.items()},
        tmp_path / "other.safetensors",
    )
    assert (
        artefact_commands.main("scan", [str(repaired), str(folder / "use"), "--model", str(tmp_path / "other.safetensors")])
        == 1
    )
    assert "was made for another model" in capsys.readouterr().err


def test_code_that_an_artefact_names_runs_only_when_allowed(repaired, tmp_path, capsys):
    import shutil

    folder = tmp_path / "tampered"
    shutil.copytree(repaired, folder)
    content = json.loads((folder / "artefact.json").read_text())
    content["model"]["_target_"] = "os.system"
    (folder / "artefact.json").write_text(json.dumps(content))
    assert artefact_commands.main("scan", [str(folder), "x.png"]) == 1
    assert "makes its model with 'os.system', code that is not marginclip's: --trust-code runs it" in capsys.readouterr().err


def test_flags_are_written_as_options():
    given = ["victim.path=m", "--json", "--images-suspect", "use", "--images-suspect=other"]
    assert _as_options(given) == ["victim.path=m", "json=true", "images_suspect=use", "images_suspect=other"]


THEIRS = """
from torch import nn


class Plain(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def plain(width=12, num_classes=10):
    return Plain(width, num_classes)
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, configure_at):
    """What another trainer leaves: code of their own, a wrapped checkpoint of a parallel network, and a normalisation outside of it."""
    import importlib.util

    folder = tmp_path_factory.mktemp("theirs")
    (folder / "nets.py").write_text(THEIRS)
    spec = importlib.util.spec_from_file_location("their_nets", folder / "nets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    setup = build_setup(configure_at(folder / "runs", "attack=none"))
    images, labels = setup.splits.train.images[torch.arange(len(setup.splits.train))].float() / 255, setup.splits.train.labels
    torch.manual_seed(0)
    network = module.plain()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(40):
        for rows in torch.randperm(len(images)).split(100):
            loss = torch.nn.functional.cross_entropy(network((images[rows] - 0.3) / 0.4), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    state = {f"module.{name}": value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save({"epoch": 12, "state_dict": state}, folder / "checkpoint.pth")
    for label, name in enumerate(setup.classes):
        rows = (setup.splits.held_out.labels == label).nonzero().flatten()
        write_images(folder / "clean" / name, setup.splits.held_out.images[rows[:20]].float() / 255)
        write_images(folder / "use", setup.splits.held_out.images[rows[20:25]].float() / 255, prefix=f"{label}-")
    return folder, network.eval()


def test_few_clean_images_are_warned_of(theirs, tmp_path, configure_at, caplog):
    import logging

    from marginclip.experiment.handed_over import repair_model

    folder, _ = theirs
    for label in range(10):
        write_images(tmp_path / "few" / str(label), [torch.from_numpy(pixels) for pixels in few_of(folder, label)])
    words = [
        "dataset=image_folder", "dataset.grey=true", "victim=checkpoint", f"victim.path={folder / 'checkpoint.pth'}",
        f"dataset.root={tmp_path / 'few'}", "model=import", f"model.target={folder / 'nets.py'}:plain", "model.mean=[0.3]",
        "model.std=[0.4]", "defense=mmdf", "defense.steps=5", "defense.extra_steps=0", "trainer.threads=1",
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        spec = configure_at(tmp_path / "runs", *words, "clean_per_class=null")
        repair_model(spec, output=str(tmp_path / "kept"), tolerance=100.0, json=True)
    (told,) = (text for record in caplog.records if "the smallest class has 4 clean images" in (text := record.getMessage()))
    assert "defense.repeats=4" in told


def few_of(folder, label):
    """Four of their clean images of a class, (1, H, W) in [0, 1]."""
    import numpy as np

    files = sorted((folder / "clean" / str(label)).iterdir())[:4]
    return [np.array(Image.open(file), dtype=np.float32)[None] / 255 for file in files]


def test_a_model_of_another_trainer_goes_all_the_way(theirs, tmp_path, configure_at, capsys):
    """Their code, their checkpoint, their normalisation: repaired, scanned, exported, and run where nothing of ours is."""
    runtime = pytest.importorskip("onnxruntime")
    import numpy as np

    from marginclip.experiment.handed_over import repair_model

    folder, network = theirs
    words = [
        "dataset=image_folder", "dataset.grey=true", "victim=checkpoint", f"victim.path={folder / 'checkpoint.pth'}",
        f"dataset.root={folder / 'clean'}", "model=import", f"model.target={folder / 'nets.py'}:plain", "+model.arguments.width=12",
        "model.mean=[0.3]", "model.std=[0.4]", "defense=mmdf", "defense.steps=10", "defense.extra_steps=0", "trainer.threads=1",
    ]  # fmt: skip
    spec = configure_at(tmp_path / "runs", *words, "clean_per_class=null")
    told = json.loads(repair_model(spec, output=str(tmp_path / "kept"), tolerance=100.0, json=True))
    assert told["accuracy"] > 85
    use = str(folder / "use")
    assert artefact_commands.main("scan", [str(tmp_path / "kept"), use]) == 1
    assert "--trust-code runs it" in capsys.readouterr().err
    assert artefact_commands.main("scan", [str(tmp_path / "kept"), use, "--json", "--trust-code"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 50
    images = torch.stack([torch.from_numpy(np.array(Image.open(row["path"]))).unsqueeze(0).float() / 255 for row in rows])
    assert [row["decision"] for row in rows] == [str(label) for label in network((images - 0.3) / 0.4).argmax(1).tolist()]
    file = tmp_path / "mmdf.onnx"
    assert artefact_commands.main("export", [str(tmp_path / "kept"), f"output={file}", "--trust-code"]) == 0
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    decisions, flagged, _ = session.run(None, {"images": images.numpy()})
    assert [row["corrected"] for row in rows] == [str(label) for label in decisions.tolist()]
    assert [row["flagged"] for row in rows] == flagged.tolist()
