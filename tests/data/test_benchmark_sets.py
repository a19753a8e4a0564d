"""GTSRB and Tiny ImageNet from small copies of their archives, with checksums made here and no network."""

import hashlib
import shutil
import zipfile

import numpy as np
import pytest
import torch
import torchvision.datasets.gtsrb as torchvision_gtsrb
from PIL import Image
from torchvision.datasets.utils import download_and_extract_archive

from marginclip.data import Gtsrb, TinyImageNet
from marginclip.data.gtsrb import SIGNS
from marginclip.errors import UserError


def picture(folder, name, width, height, shade, mode="RGB"):
    """An image of one shade in a file of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3) if mode == "RGB" else (height, width), shade, dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)


def zipped(folder, archive):
    """The content of ``folder`` as a zip file, and its checksum."""
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(folder.rglob("*")):
            out.write(path, path.relative_to(folder))
    return hashlib.md5(archive.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def files_for_downloads(monkeypatch):
    """Torchvision's download copies a file here; its checksums and its unpacking are its own."""
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        "torchvision.datasets.utils._urlretrieve", lambda url, path, **_: shutil.copyfile(url.removeprefix("file://"), path)
    )


@pytest.fixture
def signs(tmp_path, monkeypatch):
    """Three archives as those of GTSRB: three training and two test images of other sizes, each of its own shade."""
    sources = {name: tmp_path / "made" / name for name in ("training", "images", "truth")}
    for label, number in ((0, 0), (0, 1), (14, 2)):
        picture(sources["training"] / "GTSRB/Training" / f"{label:05d}", f"{number:05d}.ppm", 15 + number, 20, 10 * number)
    for number in range(2):
        picture(sources["images"] / "GTSRB/Final_Test/Images", f"{number:05d}.ppm", 30, 25, 200 + number)
    sources["truth"].mkdir()
    (sources["truth"] / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00000.ppm;30;14\n00001.ppm;30;2\n")
    names = ("GTSRB-Training_fixed.zip", "GTSRB_Final_Test_Images.zip", "GTSRB_Final_Test_GT.zip")
    archives = {name: tmp_path / "made" / name for name in names}
    sums = {name: zipped(folder, archives[name]) for name, folder in zip(names, sources.values(), strict=True)}

    def download(url, download_root, md5):
        name = url.rpartition("/")[2]
        download_and_extract_archive(archives[name].as_uri(), download_root, md5=sums[name])

    monkeypatch.setattr(torchvision_gtsrb, "download_and_extract_archive", download)
    monkeypatch.setattr(Gtsrb, "NUM_IMAGES", (3, 2))
    return tmp_path / "data", archives, sums


def test_gtsrb_is_downloaded_once_and_brought_to_one_size(signs):
    root, archives, _ = signs
    splits = Gtsrb(root=str(root), size=16).load()
    assert splits.train.labels.tolist() == [0, 0, 14]
    assert splits.held_out.labels.tolist() == [14, 2]
    assert splits.train.images.float().mean((1, 2, 3)).tolist() == [0, 10, 20]
    assert splits.held_out.images.float().mean((1, 2, 3)).tolist() == [200, 201]
    assert splits.train.images.shape == (3, 3, 16, 16)
    assert splits.train.classes == splits.held_out.classes == SIGNS
    for archive in archives.values():
        archive.unlink()
    again = Gtsrb(root=str(root), size=16, cache=str(root / "cache"))
    assert all(torch.equal(again.load().train.images, splits.train.images) for _ in range(2))
    assert len(list((root / "cache").glob("*.safetensors"))) == 2


def test_the_signs_are_43_and_stop_is_the_fourteenth():
    assert len(set(SIGNS)) == 43
    assert (SIGNS[0], SIGNS[14], SIGNS[17], SIGNS[40]) == ("speed limit 20", "stop", "no entry", "roundabout")


def test_gtsrb_whose_download_was_cut_off_is_one_sentence(signs):
    root, _, _ = signs
    Gtsrb(root=str(root)).load()
    next((root / "gtsrb/GTSRB/Training/00000").glob("*.ppm")).unlink()
    with pytest.raises(UserError, match=r"gtsrb' holds 2 of 3 images: a download was cut off; remove the folder"):
        Gtsrb(root=str(root)).load()


def test_gtsrb_of_another_checksum_is_one_sentence(signs):
    root, _, sums = signs
    sums["GTSRB_Final_Test_Images.zip"] = "0" * 32
    with pytest.raises(UserError, match=r"^GTSRB is neither in .* nor could it be downloaded \(File not found or corrupted"):
        Gtsrb(root=str(root)).load()


@pytest.mark.parametrize("there", [False, True])
def test_gtsrb_without_a_split_is_one_sentence(signs, there):
    root, _, _ = signs
    if there:
        (root / "gtsrb/GTSRB/Training/00000").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^GTSRB is neither in .*; put gtsrb/GTSRB there, or use dataset=image_folder$"):
        Gtsrb(root=str(root), download=False).load()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An archive as that of Tiny ImageNet: two classes of one name and a third, two training images and one validation image each."""
    made = tmp_path / "made" / "tiny-imagenet-200"
    identifiers = ("n02", "n01", "n03")
    for label, identifier in enumerate(identifiers):
        for number in range(2):
            mode = "RGB" if number else "L"
            picture(made / "train" / identifier / "images", f"{identifier}_{number}.JPEG", 64, 64, 40 * label + number, mode)
        picture(made / "val" / "images", f"val_{label}.JPEG", 64, 64, 40 * label)
    picture(made / "test" / "images", "test_0.JPEG", 64, 64, 9)
    lines = [f"val_{label}.JPEG\t{identifier}\t0\t0\t9\t9" for label, identifier in reversed([*enumerate(identifiers)])]
    (made / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (made / "words.txt").write_text("n01\tcrane, bird\nn02\tcrane\nn03\tgoldfish, Carassius auratus\nn09\tunused\n")
    archive = tmp_path / "tiny-imagenet-200.zip"
    monkeypatch.setattr(TinyImageNet, "MD5", zipped(made.parent, archive))
    monkeypatch.setattr(TinyImageNet, "URL", archive.as_uri())
    monkeypatch.setattr(TinyImageNet, "NUM_IMAGES", (6, 3))
    return tmp_path / "data", archive


def test_tiny_imagenet_reads_the_classes_of_val_from_its_list(tiny):
    root, archive = tiny
    splits = TinyImageNet(root=str(root)).load()
    assert splits.train.classes == ("crane (n01)", "crane (n02)", "goldfish")
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert splits.held_out.labels.tolist() == [2, 0, 1]
    assert splits.image_shape == (3, 64, 64)
    shades = splits.held_out.images.float().mean((1, 2, 3))
    torch.testing.assert_close(shades, torch.tensor([80.0, 40.0, 0.0]), atol=1.0, rtol=0)
    archive.unlink()
    assert torch.equal(TinyImageNet(root=str(root)).load().train.images, splits.train.images)


def test_tiny_imagenet_of_another_checksum_is_one_sentence(tiny, monkeypatch):
    monkeypatch.setattr(TinyImageNet, "MD5", "0" * 32)
    with pytest.raises(UserError, match=r"^Tiny ImageNet is neither in .* \(File not found or corrupted"):
        TinyImageNet(root=str(tiny[0])).load()


def test_tiny_imagenet_whose_download_was_cut_off_is_one_sentence(tiny):
    root, _ = tiny
    TinyImageNet(root=str(root)).load()
    (root / "tiny-imagenet-200/val/images/val_0.JPEG").unlink()
    with pytest.raises(UserError, match=r"tiny-imagenet-200' holds 2 of 3 images"):
        TinyImageNet(root=str(root)).load()


def test_tiny_imagenet_without_val_is_one_sentence(tiny):
    root, _ = tiny
    (root / "tiny-imagenet-200/train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^Tiny ImageNet is neither in .*val_annotations.txt"):
        TinyImageNet(root=str(root), download=False).load()
