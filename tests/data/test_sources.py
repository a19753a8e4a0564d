"""Data sources: shapes, splits within classes, and CIFAR-10 from a tiny fake copy."""

import pickle
from urllib.error import URLError

import numpy as np
import pytest
import skimage.data
import torch
import torchvision.datasets.cifar as torchvision_cifar

from marginclip.data import Cifar10, Cifar100, Digits, MnistM, MnistSubset
from marginclip.data.sources import held_out_mask, seeded_split
from marginclip.errors import UserError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.mark.parametrize(("share", "counts"), [(0.3, [3, 6, 1]), (0.01, [1, 1, 1]), (1.0, [10, 20, 2])])
def test_the_same_share_of_every_class_is_held_out(share, counts):
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 2)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    mask = held_out_mask(labels, held_out_share=share, seed=0)
    assert torch.bincount(labels[mask], minlength=3).tolist() == counts
    torch.manual_seed(1)
    assert torch.equal(mask, held_out_mask(labels, held_out_share=share, seed=0))


def test_a_seeded_split_loses_no_image_and_keeps_labels():
    images, labels = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1), torch.arange(60) % 3
    splits = seeded_split(images, labels, ("a", "b", "c"), held_out_share=0.25, seed=0)
    both = torch.cat([splits.train.images, splits.held_out.images]).flatten()
    assert sorted(both.tolist()) == list(range(60))
    assert torch.equal(both % 3, torch.cat([splits.train.labels, splits.held_out.labels]).to(torch.uint8))
    other = seeded_split(images, labels, ("a", "b", "c"), held_out_share=0.25, seed=1)
    assert not torch.equal(other.held_out.images, splits.held_out.images)


def test_digits_repeat_pixels_and_span_the_bytes():
    small, large = Digits(scale=1).load(), Digits(scale=3).load()
    assert len(small.train) + len(small.held_out) == 1797
    assert small.image_shape == (1, 8, 8)
    assert torch.equal(large.train.images[:, :, 1::3, 2::3], small.train.images)
    assert large.image_shape == (1, 24, 24)
    assert (small.train.images.dtype, small.train.images.max().item()) == (torch.uint8, 255)


def test_mnist_subset_holds_500_of_each_digit():
    splits = MnistSubset(held_out_share=0.2).load()
    assert splits.image_shape == (1, 28, 28)
    assert torch.bincount(splits.train.labels).tolist() == [400] * 10
    assert torch.bincount(splits.held_out.labels).tolist() == [100] * 10
    assert splits.train.images.max() == 255


def test_mnist_m_is_the_difference_of_digits_and_photographs():
    digits, blended = MnistSubset(held_out_share=0.2).load(), MnistM(held_out_share=0.2).load()
    assert blended.image_shape == (3, 28, 28)
    assert torch.equal(blended.train.labels, digits.train.labels)
    # Where the digit is black the photograph is seen, where it is white its negative.
    black, white = (digits.train.images == shade for shade in (0, 255))
    photographs = torch.where(white, 255 - blended.train.images, blended.train.images)
    known = (black | white).expand_as(photographs)
    astronaut = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)
    crops = astronaut.unfold(1, 28, 1).unfold(2, 28, 1)  # (3, 485, 485, 28, 28)
    found = []
    for photograph, seen in zip(photographs[:40], known[:40], strict=True):
        row, column = seen[0].nonzero()[0].tolist()
        candidates = (crops[:, :, :, row, column] == photograph[:, row, column].view(3, 1, 1)).all(0).nonzero().tolist()
        found.append(any(torch.equal(crops[:, top, left][seen], photograph[seen]) for top, left in candidates))
    assert 3 <= sum(found) <= 25  # about a quarter of them are of this photograph
    assert torch.equal(blended.train.images, MnistM(held_out_share=0.2).load().train.images)
    assert not torch.equal(blended.train.images, MnistM(held_out_share=0.2, background_seed=1).load().train.images)


@pytest.mark.parametrize("source", [Digits(), MnistSubset(), MnistM(), Cifar10(), Cifar100()])
def test_the_settings_say_all_about_images_that_never_change(source):
    assert source.digest() is None


@pytest.mark.parametrize("make", [lambda: Digits(scale=0), lambda: Digits(held_out_share=0).load(), lambda: held_out_mask(
    torch.zeros(3), held_out_share=2, seed=0)])  # fmt: skip
def test_bad_settings_are_refused(make):
    with pytest.raises(UserError, match="must be"):
        make()


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """Two images in each of CIFAR-10's six files, in the original layout; checksums are not looked at."""
    folder, generator, pixels, labels = tmp_path / "cifar-10-batches-py", np.random.default_rng(0), [], []
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels.append(generator.integers(0, 256, (2, 3072), dtype=np.uint8))
        labels.append(generator.integers(0, 10, 2).tolist())
        (folder / name).write_bytes(pickle.dumps({"data": pixels[-1], "labels": labels[-1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    monkeypatch.setattr(torchvision_cifar, "check_integrity", lambda *_: True)
    return tmp_path, torch.from_numpy(np.concatenate(pixels)).view(12, 3, 32, 32), [label for pair in labels for label in pair]


def test_cifar10_keeps_the_order_and_the_planes_of_its_files(fake_cifar):
    root, pixels, labels = fake_cifar
    splits = Cifar10(root=str(root), download=False).load()
    assert torch.equal(torch.cat([splits.train.images, splits.held_out.images]), pixels)
    assert splits.train.labels.tolist() + splits.held_out.labels.tolist() == labels
    assert (len(splits.train), len(splits.held_out)) == (10, 2)
    assert splits.train.classes == splits.held_out.classes == tuple(NAMES)
    assert (splits.train.images.dtype, splits.train.labels.dtype) == (torch.uint8, torch.int64)


def test_cifar100_has_the_fine_classes(tmp_path, monkeypatch):
    folder, generator = tmp_path / "cifar-100-python", np.random.default_rng(0)
    folder.mkdir()
    fine = [f"class {number}" for number in range(100)]
    for name in ("train", "test"):
        content = {
            "data": generator.integers(0, 256, (2, 3072), dtype=np.uint8),
            "fine_labels": [99, 0],
            "coarse_labels": [1, 2],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": fine, "coarse_label_names": ["a"]}))
    monkeypatch.setattr(torchvision_cifar, "check_integrity", lambda *_: True)
    splits = Cifar100(root=str(tmp_path), download=False).load()
    assert splits.train.classes == tuple(fine)
    assert splits.train.labels.tolist() == splits.held_out.labels.tolist() == [99, 0]
    assert splits.image_shape == (3, 32, 32)


@pytest.mark.parametrize("download", [True, False])
def test_cifar10_that_cannot_be_had_is_a_message(download, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision_cifar, "download_and_extract_archive", no_network)
    with pytest.raises(UserError, match=f"neither in dataset.root='{tmp_path}' nor could it be downloaded") as caught:
        Cifar10(root=str(tmp_path), download=download).load()
    assert ("no route to host" in str(caught.value)) == download
