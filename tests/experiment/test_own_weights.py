"""Models that bring their weights, a folder of transformers and an exported program: ``repair``, ``scan`` and ``export`` as typed."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from marginclip.experiment import artefact_commands
from marginclip.experiment.recipe import run_identity
from marginclip.experiment.setup import load_splits

TINY = [
    "dataset=image_folder", "victim=checkpoint", "defense=mmdf", "defense.steps=2", "defense.extra_steps=0", "trainer.threads=1",
    "clean_per_class=null",
]  # fmt: skip


def huggingface(folder):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder / "model")
    return [f"model.path={folder / 'model'}", "model=huggingface"], []


def exported(folder):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(144, 3)
    )
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network.eval(), (torch.rand(2, 3, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, folder / "model.pt2")
    return [f"model.path={folder / 'model.pt2'}", "model=exported", "model.trust=true"], ["--trust-code"]


@pytest.fixture
def images(tmp_path):
    """Twelve noisy images of each of three colours, in ``clean/<class>/``."""
    generator = torch.Generator().manual_seed(0)
    for label in range(3):
        (tmp_path / "clean" / f"class{label}").mkdir(parents=True)
        for number in range(12):
            pixels = torch.randint(0, 120, (16, 16, 3), generator=generator, dtype=torch.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels.numpy()).save(tmp_path / "clean" / f"class{label}" / f"{number}.png")
    return tmp_path / "clean"


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        (["dataset=image_folder"], (0, 36)),  # nothing is trained: all images are for the defender
        (["dataset=image_folder", "dataset.held_out_share=0.25"], (27, 9)),  # the model knows the others
        (["dataset=digits"], (899, 898)),  # ours may have been trained on the first part
    ],
)
def test_what_is_held_out_from_a_model_that_is_given(images, tmp_path, configure_at, words, counts):
    spec = configure_at(tmp_path, *TINY, *words, *([f"dataset.root={images}"] if "digits" not in words[0] else []))
    splits = load_splits(spec)
    assert (len(splits.train), len(splits.held_out)) == counts


@pytest.mark.parametrize("make", [huggingface, exported])
def test_a_model_with_its_own_weights_goes_all_the_way(make, images, tmp_path, configure_at, capsys):
    from marginclip.experiment.handed_over import repair_model

    words, flags = make(tmp_path)
    spec = configure_at(tmp_path / "runs", *TINY, f"dataset.root={images}", *words)
    kept = str(tmp_path / "kept")
    repair_model(spec, output=kept, tolerance=100.0, json=True)
    if flags:
        assert artefact_commands.main("scan", [kept, str(images)]) == 1
        assert "code that is not marginclip's: --trust-code runs it" in capsys.readouterr().err
    assert artefact_commands.main("scan", [kept, str(images), "--json", *flags]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 36
    file = tmp_path / "mmdf.pt2"
    assert artefact_commands.main("export", [kept, "format=pt2", f"output={file}", *flags]) == 0
    import numpy as np

    batch = torch.stack([torch.from_numpy(np.array(Image.open(row["path"]))).permute(2, 0, 1).float() / 255 for row in rows])
    decisions, flagged, _ = torch.export.load(file).module()(batch)
    assert [row["corrected"] for row in rows] == [f"class{label}" for label in decisions.tolist()]
    assert [row["flagged"] for row in rows] == flagged.tolist()


def test_other_weights_in_the_same_folder_are_another_run(images, tmp_path, configure_at):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    words = [*TINY, f"dataset.root={images}", "model=huggingface", f"model.path={tmp_path / 'model'}"]
    found = []
    for content in (b"one", b"other", b"one"):
        (tmp_path / "model" / "model.safetensors").write_bytes(content)
        found.append(run_identity(configure_at(tmp_path / "runs", *words))["checkpoint_content"])
    assert found[0] == found[2] != found[1]
