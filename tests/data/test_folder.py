"""Folders of images: what is read, what is refused by name, the cache, and streaming."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from marginclip.data import ImageFolder
from marginclip.data.folder import folder_digest, list_images
from marginclip.data.images import decode
from marginclip.errors import UserError

TINY = 1e-9  # GiB: nothing fits into memory


def save(path, size=(16, 16), seed=0, mode="RGB"):
    """One image of noise; returns its pixels as uint8 (3, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    image.save(path)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture
def root(tmp_path):
    """Two classes of ten images each."""
    for label, name in enumerate(("cat", "dog")):
        for number in range(10):
            save(tmp_path / "images" / name / f"{number}.png", seed=10 * label + number)
    return tmp_path / "images"


def everything(images):
    return images.images[torch.arange(len(images))]


def test_a_single_folder_is_split_by_class(root):
    splits = ImageFolder(root=str(root), held_out_share=0.3).load()
    assert splits.image_shape == (3, 16, 16)
    assert splits.train.classes == splits.held_out.classes == ("cat", "dog")
    assert splits.train.labels.tolist() == [0] * 7 + [1] * 7
    assert splits.held_out.labels.tolist() == [0] * 3 + [1] * 3
    expected = [save(root.parent / "x.png", seed=seed) for seed in range(20)]
    both = torch.cat([everything(splits.train), everything(splits.held_out)])
    assert both.dtype == torch.uint8
    assert sorted(image.sum().item() for image in both) == sorted(image.sum().item() for image in expected)
    for part in (splits.train, splits.held_out):
        for image, label in zip(everything(part), part.labels, strict=True):
            assert any(torch.equal(image, stored) for stored in expected[10 * label : 10 * label + 10])


def test_the_split_is_a_function_of_its_seed(root):
    draws = [everything(ImageFolder(root=str(root), split_seed=seed).load().held_out) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_train_and_test_folders_are_taken_as_they_are(held_out, tmp_path):
    for part, count in (("train", 3), (held_out, 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                save(tmp_path / part / name / f"{number}.png", seed=number)
    splits = ImageFolder(root=str(tmp_path)).load()
    assert (splits.train.labels.tolist(), splits.held_out.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])


def test_train_and_test_must_have_the_same_classes_and_size(tmp_path):
    for part, name, size in (("train", "cat", 16), ("train", "dog", 16), ("test", "cat", 16), ("test", "cow", 16)):
        save(tmp_path / part / name / "0.png", (size, size))
    with pytest.raises(UserError, match="different classes: cow, dog in one of them only"):
        ImageFolder(root=str(tmp_path)).load()
    (tmp_path / "test" / "cow").rename(tmp_path / "test" / "dog")
    for name in ("cat", "dog"):
        save(tmp_path / "test" / name / "0.png", (20, 20))
    with pytest.raises(UserError, match="20 x 20 pixels, not 16 x 16"):
        ImageFolder(root=str(tmp_path)).load()
    assert ImageFolder(root=str(tmp_path), size=12).load().image_shape == (3, 12, 12)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    suffix = "jpg" if mode == "CMYK" else "png"
    path = tmp_path / f"image.{suffix}"
    save(path, mode=mode)
    with Image.open(path) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(path, None), expected)


@pytest.mark.parametrize(("size", "side"), [((32, 20), 10), ((20, 32), 10), ((9, 31), 16)])
def test_scaling_keeps_the_shape_of_things_and_cuts_the_centre(size, side, tmp_path):
    """A plain image with one bright square in the middle: it stays square and in the middle."""
    canvas = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    middle, half = (size[1] // 2, size[0] // 2), min(size) // 4
    canvas[middle[0] - half : middle[0] + half, middle[1] - half : middle[1] + half] = 255
    Image.fromarray(canvas).save(tmp_path / "image.png")
    image = decode(tmp_path / "image.png", side)
    assert image.shape == (3, side, side)
    bright = (image[0] > 127).nonzero().float()
    height, width = (bright.amax(0) - bright.amin(0) + 1).tolist()
    assert abs(height - width) <= 1
    assert (bright.mean(0) - (side - 1) / 2).abs().max() <= 1


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
@pytest.mark.parametrize("grey", [False, True])
def test_grey_values_of_16_bits_are_scaled(name, grey, tmp_path):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(values).save(tmp_path / name)
    image = decode(tmp_path / name, None, grey=grey)
    assert torch.equal(image, torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(1 if grey else 3, -1, -1))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused_by_name(kind, root):
    Image.fromarray(np.ones((16, 16), kind)).save(root / "dog" / "wide.tif")
    with pytest.raises(UserError, match=r"wide.tif' has 32-bit pixels of unknown range: save it with 8 or 16 bits"):
        ImageFolder(root=str(root)).load()


def test_hidden_files_and_folders_are_ignored(root):
    (root / "cat" / ".DS_Store").write_text("no image")
    (root / "cat" / ".ipynb_checkpoints").mkdir()
    (root / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png").write_text("no image")
    (root / ".git").mkdir()
    (root / "readme.txt").write_text("beside the classes")
    splits = ImageFolder(root=str(root)).load()
    assert len(splits.train) + len(splits.held_out) == 20


def test_files_of_sub_folders_are_listed_in_the_order_of_their_names(root):
    for name in ("10/0.png", "1.5/z.png", "B/deeper/0.png", "b.png"):
        save(root / "cat" / name)
    files, labels, classes = list_images(root)
    cats = [path for path in (root / "cat").rglob("*") if path.is_file()]
    assert [file.path for file in files[: len(cats)]] == [str(path) for path in sorted(cats)]
    assert [file.size for file in files] == [os.path.getsize(file.path) for file in files]
    assert labels.tolist() == [0] * 14 + [1] * 10
    assert classes == ("cat", "dog")


def test_the_digest_of_a_folder_follows_names_and_sizes_but_not_its_place(root, tmp_path, monkeypatch):
    first = ImageFolder(root=str(root)).digest()
    monkeypatch.chdir(root)
    assert folder_digest(Path(".")) == first
    moved = shutil.copytree(root, tmp_path / "moved")
    assert folder_digest(moved) == first
    (moved / "dog" / "0.png").rename(moved / "dog" / "other.png")
    renamed = folder_digest(moved)
    save(moved / "dog" / "other.png", (32, 32))
    assert len({first, renamed, folder_digest(moved)}) == 3


def test_a_folder_that_must_not_be_read_is_named(root, monkeypatch):
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("private"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    (root / "dog" / "private").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="private' cannot be read: Permission denied"):
        ImageFolder(root=str(root)).load()


def spoil(root, fault):
    path = root / "dog" / "4.png"
    if fault == "corrupt":
        path.write_bytes(path.read_bytes()[:300])
    elif fault == "not an image":
        path.write_text("hello")
    else:
        save(path, (17, 16))
    return path


@pytest.mark.parametrize("memory_gib", [4.0, TINY], ids=["in memory", "streaming"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [("corrupt", "is corrupt"), ("not an image", "is not an image"), ("size", "is 17 x 16 pixels, not 16 x 16")],
)
def test_files_that_cannot_be_used_are_named(fault, message, memory_gib, root):
    path = spoil(root, fault)
    with pytest.raises(UserError, match=f"{path}' {message}"):
        everything(ImageFolder(root=str(root), held_out_share=1.0, memory_gib=memory_gib).load().held_out)


def test_all_faults_are_counted_and_the_first_five_shown(root):
    for number in range(3, 10):
        (root / "cat" / f"{number}.png").write_text("hello")
    with pytest.raises(UserError, match=r"7 of 20 files cannot be used: .*7.png' is not an image; and 2 more$"):
        ImageFolder(root=str(root)).load()


def empty(path):
    path.mkdir()


def one_class(path):
    save(path / "cat" / "0.png")


def class_without_images(path):
    save(path / "cat" / "0.png")
    (path / "dog").mkdir()


def first_not_square(path):
    for name in ("cat", "dog"):
        save(path / name / "0.png", (20, 16))


def first_no_image(path):
    (path / "cat").mkdir(parents=True)
    (path / "cat" / "0.png").write_text("hello")
    save(path / "dog" / "0.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not a folder"),
        (empty, "is empty: it needs one sub-folder of images a class"),
        (one_class, r"one class only \('cat'\)"),
        (class_without_images, "class 'dog' has no images"),
        (first_not_square, "20 x 16 pixels, not square: set dataset.size"),
        (first_no_image, "0.png' is not a readable image"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(make, message, tmp_path):
    make(tmp_path / "images")
    with pytest.raises(UserError, match=message):
        ImageFolder(root=str(tmp_path / "images")).load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": None}, "needs dataset.root"),
        ({"size": 4}, "dataset.size must be at least 8 pixels, got 4"),
        ({"held_out_share": 0}, r"dataset.held_out_share must be in \(0, 1\], got 0"),
        ({"held_out_share": 30}, "got 30"),
    ],
)
def test_bad_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ImageFolder(**({"root": str(tmp_path)} | settings))


@pytest.mark.parametrize("size", [None, 12])
def test_streaming_gives_the_same_images(size, root):
    memory, streamed = (ImageFolder(root=str(root), size=size, memory_gib=gib).load() for gib in (4.0, TINY))
    for part in ("train", "held_out"):
        in_memory, decoded = getattr(memory, part), getattr(streamed, part)
        assert not isinstance(decoded.images.images, torch.Tensor)
        assert torch.equal(everything(in_memory), everything(decoded))
        assert torch.equal(in_memory.labels, decoded.labels)


def test_the_cache_is_used_and_refreshed_when_a_file_changes(root, tmp_path, monkeypatch):
    cache, source = tmp_path / "cache", ImageFolder(root=str(root), cache=str(tmp_path / "cache"))
    first = everything(source.load().train)
    (file,) = cache.glob("*.safetensors")

    def no_decoding(*_):
        raise AssertionError("the images should come from the cache")

    with monkeypatch.context() as patch:
        patch.setattr("marginclip.data.images.decode", no_decoding)
        assert torch.equal(everything(source.load().train), first)
    file.write_bytes(b"half a file")
    assert torch.equal(everything(source.load().train), first)
    for number in range(10):
        save(root / "cat" / f"{number}.png", seed=100 + number)
        os.utime(root / "cat" / f"{number}.png", ns=(1, 1))
    assert torch.equal(everything(source.load().train), everything(ImageFolder(root=str(root)).load().train))
    assert not torch.equal(everything(source.load().train), first)
    assert not any(path.name.endswith(".partial") for path in cache.iterdir())
