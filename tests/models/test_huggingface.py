"""Tiny classifiers of transformers, made from their configurations: from a folder to bounds, without a download."""

import json

import pytest
import torch

from marginclip import MMAC, BoundedNetwork, MarginDropDetector, repair
from marginclip.defenses import AscentPlan
from marginclip.errors import UserError
from marginclip.models import huggingface_model

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

CONFIGS = {
    "resnet": lambda: transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    ),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        num_labels=3,
    ),
}
BOUNDS = {
    "resnet": [(1, 4)] * 3 + [(1, 8)] * 2,
    "vit": [(2, 16)] * 2,
}  # the axis of the channels and their number, for each call


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with configuration and weights for each of the networks."""
    root = tmp_path_factory.mktemp("huggingface")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        transformers.AutoModelForImageClassification.from_config(config()).save_pretrained(root / name)
    return root


@pytest.fixture
def batch():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_and_every_activation_is_bounded(folders, name, batch):
    model = huggingface_model(3, path=str(folders / name)).eval()
    assert model.loaded_from == str(folders / name)
    network = transformers.AutoModelForImageClassification.from_pretrained(folders / name).eval()
    assert torch.equal(model(batch), network(batch).logits)
    bounded = BoundedNetwork(model, batch[0])
    for size in (1, 2, 5):
        assert torch.equal(bounded(batch[:size]), model(batch[:size]))
    assert [(bound.axis, len(bound.upper)) for _, bound in bounded.each()] == BOUNDS[name]
    bounded.set_from_images(batch, share=0.5)
    images = batch.clone().requires_grad_()
    bounded(images).square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(bound.upper.grad.abs().sum() > 0 for _, bound in bounded.each())


def test_repair_and_detector_go_all_the_way(folders):
    model = huggingface_model(3, path=str(folders / "resnet")).eval()
    images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 3
    method = MMAC(steps=2, extra_steps=0, check_every=1, ascent=AscentPlan(starts_per_class=1, steps=1, first_steps=1))
    repaired = repair(model, images, labels, defense=method)
    assert isinstance(repaired, BoundedNetwork)
    found = MarginDropDetector.fit(model, repaired, images)(images)
    assert found.decisions.shape == (24,)
    assert found.p_values.isfinite().all()


def test_the_normalisation_is_that_of_the_folder(folders, batch, tmp_path):
    (tmp_path / "config.json").write_text((folders / "vit" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folders / "vit" / "model.safetensors").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": 0.5}))
    model, plain = (huggingface_model(3, path=str(folder)).eval() for folder in (tmp_path, folders / "vit"))
    wanted = (batch - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    torch.testing.assert_close(model(batch), plain(wanted))
    given = huggingface_model(3, path=str(tmp_path), mean=None, std=None).eval()
    assert torch.equal(given(batch), plain(batch))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViT", {}),
        ("ViT", {"do_normalize": False}),
        ("ViT", {"rescale_factor": 1 / 127.5}),
        ("ViT", {"do_rescale": False, "do_normalize": False}),
        ("EfficientNet", {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.4, 0.6]}),
        ("EfficientNet", {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.4, 0.6], "include_top": False}),
        ("EfficientNet", {"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 1 / 127.5, "rescale_offset": True}),
        ("MobileViT", {"do_flip_channel_order": False, "do_center_crop": False}),
    ],
)
def test_images_are_prepared_as_the_folder_says(folders, tmp_path, kind, settings):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders / "vit" / name).read_bytes())
    try:
        processor = getattr(transformers, f"{kind}ImageProcessor")(**settings, do_resize=False)
    except (AttributeError, ImportError) as error:
        pytest.skip(str(error))
    processor.save_pretrained(tmp_path)
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = processor(image, return_tensors="pt")["pixel_values"]
    found = huggingface_model(3, path=str(tmp_path)).normalize(image[None] / 255)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)


def test_the_normalisation_of_timm_is_in_its_configuration(folders, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((folders / "vit" / "model.safetensors").read_bytes())
    content = json.loads((folders / "vit" / "config.json").read_text())
    statistics = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "config.json").write_text(json.dumps(content | {"pretrained_cfg": statistics}))
    normalize = huggingface_model(3, path=str(tmp_path)).normalize
    assert torch.equal(normalize.mean.flatten(), torch.tensor(statistics["mean"]))
    assert torch.equal(normalize.std.flatten(), torch.tensor(statistics["std"]))


def test_channels_in_another_order_are_refused(folders, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders / "vit" / name).read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "MobileViTImageProcessor"}))
    with pytest.raises(UserError, match="wants its channels in the order blue, green, red"):
        huggingface_model(3, path=str(tmp_path))


def test_without_weights_they_are_fresh_and_for_the_classes_asked_for(folders, batch, tmp_path):
    (tmp_path / "config.json").write_text((folders / "resnet" / "config.json").read_text())
    model = huggingface_model(7, path=str(tmp_path)).eval()
    assert model.loaded_from is None
    assert model(batch).shape == (5, 7)


def test_a_folder_that_cannot_be_used_is_one_sentence(folders, tmp_path):
    with pytest.raises(UserError, match=r"model.path must be a folder with config.json and safetensors, got None"):
        huggingface_model(3)
    with pytest.raises(UserError, match=r"has 3 classes and the data set 5: dataset.root needs one sub-folder for each"):
        huggingface_model(5, path=str(folders / "vit"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"holds no image classifier that transformers can make"):
        huggingface_model(3, path=str(tmp_path))


def test_code_in_the_folder_is_not_run(tmp_path):
    content = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "theirs.py").write_text("raise SystemExit('their code was run')")
    with pytest.raises(UserError, match=r"holds no image classifier that transformers can make"):
        huggingface_model(3, path=str(tmp_path))
