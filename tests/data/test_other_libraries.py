"""Data sets of torchvision and of the Hugging Face library, from small copies made here and no network."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from marginclip.data import HuggingFaceData, TorchvisionData
from marginclip.data.decoded import decode_all
from marginclip.errors import UserError


class Pictures(torchvision.datasets.VisionDataset):
    """Eight images a split, whose shade is their number; a stand-in for a data set of torchvision."""

    classes = ("even", "odd")

    def __init__(self, root: str, split: str = "train", side: int = 16, download: bool = False) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"no split {split}")
        if not download:
            raise RuntimeError("Dataset not found")
        self.first, self.side = 0 if split == "train" else 100, side

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Image.new("RGB", (self.side, self.side), (self.first + index,) * 3), index % 2


class Whole(Pictures):
    def __init__(self, root: str) -> None:
        super().__init__(root, download=True)


class Flagged(Pictures):
    def __init__(self, root: str, train: bool = True) -> None:
        super().__init__(root, "train" if train else "val", download=True)


class Described(Whole):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], {"boxes": []}


class Tall(Whole):
    def __getitem__(self, index):
        return Image.new("RGB", (16, 17)), 0


class OwnNames(Pictures):
    """A set whose training split has another name; its first class has no image."""

    classes = ("N/A", "even", "odd")

    def __init__(self, root: str, split: str = "trainval") -> None:
        if split not in ("trainval", "test"):
            raise ValueError(f"no split {split}")
        super().__init__(root, "train" if split == "trainval" else "val", download=True)

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label + 1


class Asking(Pictures):
    def __init__(self, root: str, kind: str) -> None:
        super().__init__(root, download=True)


class Deep(Whole):
    def __getitem__(self, index):
        return Image.new("F", (16, 16), 0.5), index % 2


class NoTest(Pictures):
    def __init__(self, root: str, split: str = "train") -> None:
        if split != "train":
            raise ValueError("only 'train' is known")
        super().__init__(root, download=True)


@pytest.fixture(autouse=True)
def among_those_of_torchvision(monkeypatch):
    kinds = (Pictures, Whole, Flagged, Described, Tall, OwnNames, Asking, Deep, NoTest)
    for kind in kinds:
        monkeypatch.setattr(torchvision.datasets, kind.__name__, kind, raising=False)
    names = (*torchvision.datasets.__all__, *(kind.__name__ for kind in kinds))
    monkeypatch.setattr(torchvision.datasets, "__all__", names)


@pytest.mark.parametrize("name", ["Pictures", "Flagged"])
def test_the_splits_of_a_torchvision_set_are_kept(name, tmp_path):
    splits = TorchvisionData(dataset=name, root=str(tmp_path)).load()
    for part, first in ((splits.train, 0), (splits.held_out, 100)):
        assert part.images[:, 0, 3, 5].tolist() == [*range(first, first + 8)]
        assert part.labels.tolist() == [0, 1] * 4
        assert part.classes == ("even", "odd")
    assert splits.image_shape == (3, 16, 16)


def test_other_names_of_the_training_split_are_known_and_classes_without_images_left_out(tmp_path, caplog):
    caplog.set_level("INFO", "marginclip")
    splits = TorchvisionData(dataset="OwnNames", root=str(tmp_path)).load()
    assert splits.train.classes == ("even", "odd")
    assert splits.train.labels.tolist() == splits.held_out.labels.tolist() == [0, 1] * 4
    assert splits.held_out.images[0, 0, 0, 0] == 100
    assert "has no image of 'N/A', which is left out" in caplog.text


def test_one_without_splits_is_split_by_seed(tmp_path):
    splits = TorchvisionData(dataset="Whole", root=str(tmp_path), held_out_share=0.25, grey=True, size=8).load()
    shades = [set(part.images[:, 0, 0, 0].tolist()) for part in (splits.train, splits.held_out)]
    assert shades[0] | shades[1] == set(range(8))
    assert [len(each) for each in shades] == [6, 2]
    assert splits.image_shape == (1, 8, 8)


def test_further_arguments_reach_the_set_and_classes_without_names_are_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(Pictures, "classes", None)
    splits = TorchvisionData(dataset="Pictures", root=str(tmp_path), arguments={"side": 12}).load()
    assert splits.image_shape == (3, 12, 12)
    assert splits.train.classes == ("0", "1")


def test_a_set_that_ships_with_torchvision_can_be_had(tmp_path):
    arguments = {"size": 6, "image_size": (3, 8, 8), "num_classes": 2}
    splits = TorchvisionData(dataset="FakeData", root=str(tmp_path), arguments=arguments, held_out_share=0.5).load()
    assert len(splits.train) + len(splits.held_out) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs dataset.dataset, such as"),
        ({"dataset": "SVNH"}, "'SVNH' is not a data set of torchvision; did you mean 'SVHN'?"),
        ({"dataset": "Pictures", "download": False}, r"Pictures is neither in .* \(Dataset not found\); put it there"),
        ({"dataset": "Described"}, "is no data set of images with one class each: a sample holds Image, dict"),
        ({"dataset": "Asking"}, r"refuses its arguments \(.*'kind'\): give them as \+dataset.arguments.NAME=VALUE"),
        ({"dataset": "Deep"}, "an image of torchvision's Deep has 32-bit pixels of unknown range"),
        ({"dataset": "Tall"}, "has images of 16 x 17 pixels: set dataset.size"),
        ({"dataset": "NoTest"}, r"has no split test, val, .* \(only 'train' is known\)"),
        ({"dataset": "Whole", "memory_gib": 1e-6}, "takes 0.0 GiB or more of memory: set a smaller dataset.size"),
        ({"dataset": "Whole", "size": 4}, "dataset.size must be at least 8 pixels, got 4"),
    ],
)
def test_torchvision_sets_that_cannot_be_used_are_one_sentence(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        TorchvisionData(root=str(tmp_path), **settings).load()


def test_decoding_keeps_the_order_and_refuses_nothing_at_all():
    pictures = [(Image.new("L", (8, 8), shade), shade % 3) for shade in (7, 200, 30)]
    images, labels = decode_all(pictures, count=None, size=None, grey=True, memory_bytes=1e6, title="it")
    assert images.flatten(1).float().mean(1).tolist() == [7, 200, 30]
    assert labels.tolist() == [1, 2, 0]
    with pytest.raises(UserError, match="it has no images"):
        decode_all([], count=0, size=None, grey=True, memory_bytes=1e6, title="it")


# -- Hugging Face ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictured(tmp_path, monkeypatch):
    """A folder of images as the library reads it: two classes, three training and two test images each."""
    pytest.importorskip("datasets")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((10, 12, 3), 100 * label + number + (50 if split == "test" else 0), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hugging_face_set_keeps_its_splits_and_names(pictured, streaming):
    splits = HuggingFaceData(path=str(pictured), size=8, streaming=streaming).load()
    assert splits.train.classes == splits.held_out.classes == ("cat", "dog")
    found = sorted(zip(splits.train.labels.tolist(), splits.train.images[:, 0, 0, 0].tolist(), strict=True))
    assert found == [(0, 0), (0, 1), (0, 2), (1, 100), (1, 101), (1, 102)]
    assert sorted(splits.held_out.images[:, 0, 0, 0].tolist()) == [50, 51, 150, 151]
    assert splits.image_shape == (3, 8, 8)


def test_another_local_folder_is_another_victim(pictured):
    source = HuggingFaceData(path=str(pictured))
    before = source.digest()
    (pictured / "train/cat/9.png").write_bytes((pictured / "train/cat/0.png").read_bytes())
    assert before != source.digest()
    assert HuggingFaceData(path="someone/something").digest() is None


def test_one_split_is_divided_and_labels_without_names_are_their_values(pictured, tmp_path):
    import datasets

    rows = {"picture": [str(path) for path in sorted(pictured.rglob("*.png"))], "kind": ["b", "a"] * 5}
    table = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "train.parquet")
    settings = {"path": str(tmp_path / "table"), "image": "picture", "label": "kind", "size": 8}
    splits = HuggingFaceData(**settings, held_out_share=0.4).load()
    assert splits.train.classes == ("a", "b")
    assert splits.held_out.labels.bincount().tolist() == [2, 2]
    with pytest.raises(UserError, match="holds no images but str; name the column of images"):
        HuggingFaceData(**settings | {"image": "kind"}).load()


@pytest.fixture
def table(pictured, tmp_path):
    """Settings of a table whose images have these labels."""
    import datasets

    def write(labels):
        images = sorted(map(str, pictured.rglob("*.png")))
        rows = {"image": (images * len(labels))[: len(labels)], "label": labels}
        folder = tmp_path / "table"
        folder.mkdir()
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet")
        return {"path": str(folder), "size": 8}

    return write


def test_labels_that_are_numbers_keep_their_order(table):
    splits = HuggingFaceData(**table([number for number in range(12) for _ in range(2)]), held_out_share=0.5).load()
    assert splits.train.classes == tuple(map(str, range(12)))
    assert splits.held_out.labels.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("labels", "told"), [([0, 1, -1, 2], "it holds -1"), ([0, 1, None, 1], "it holds None"), ([0.5, 1.0], r"it holds 0.5, 1.0")]
)
def test_labels_that_are_no_classes_are_refused(table, labels, told):
    with pytest.raises(UserError, match=r"must hold one word, or one number from 0 up, for each image; " + told):
        HuggingFaceData(**table(labels)).load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "needs dataset.path, a name on the Hub or a folder"),
        ({"train_split": "training"}, r"dataset.train_split='training' is not a split of .* \(there are train, test\)"),
        ({"held_out_split": "dev"}, "dataset.held_out_split='dev' is not a split"),
        ({"label": "labels"}, r"dataset.label='labels' is not a column of .* \(there are image, label\)"),
        ({}, "has images of 12 x 10 pixels: set dataset.size"),
    ],
)
def test_hugging_face_sets_that_cannot_be_used_are_one_sentence(settings, message, pictured):
    with pytest.raises(UserError, match=message):
        HuggingFaceData(**{"path": str(pictured)} | settings).load()


def test_a_folder_that_is_no_data_set_is_one_sentence(pictured, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"^dataset.path='.*nothing' cannot be loaded: "):
        HuggingFaceData(path=str(tmp_path / "nothing")).load()


def test_decoded_labels_are_whole_numbers(tmp_path):
    assert TorchvisionData(dataset="Whole", root=str(tmp_path)).load().train.labels.dtype == torch.int64
