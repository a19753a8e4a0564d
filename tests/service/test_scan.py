"""Scanning files: the rows are the detector's own, whatever the batches; hostile files are named and the rest is done."""

import os
import signal
import struct
import zlib
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from marginclip.errors import UserError
from marginclip.experiment import artefact_commands
from marginclip.service import scan
from marginclip.service.scan import LeftOut, image_files

from .conftest import quarters, triggered


@pytest.fixture
def folder(tmp_path):
    """Thirty images, twelve of them triggered, as PNG files, and their tensor in the order of the names."""
    images, _ = quarters(30, seed=7)
    images[18:] = triggered(images[18:])
    for number, image in enumerate(images):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(tmp_path / f"{number:02}.png")
    return tmp_path, images


def png_header(width, height):
    """A PNG file that claims a size and has no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_rows_are_what_the_detector_says(artefact, folder, batch_size):
    path, images = folder
    rows = list(scan(artefact, sorted(image_files([path])), batch_size=batch_size))
    detection, original = artefact(images), artefact.model(images).argmax(1)
    assert [row.path for row in rows] == [str(path / f"{number:02}.png") for number in range(30)]
    assert [row.flagged for row in rows] == detection.flagged.tolist()
    assert [row.decision for row in rows] == [artefact.classes[label] for label in original]
    assert [row.corrected for row in rows] == [artefact.classes[label] for label in detection.decisions]
    assert [row.p_value for row in rows] == pytest.approx(detection.p_values.tolist(), rel=1e-4)
    assert [row.statistic for row in rows] == pytest.approx(detection.statistic.tolist(), abs=1e-4)
    assert {row.error for row in rows} == {None}
    assert any(row.flagged for row in rows[18:])


def test_a_model_of_neither_grey_nor_colour_images_is_refused(artefact, folder):
    path, _ = folder
    with pytest.raises(UserError, match="scan reads grey images and colour images, and this model takes 4 channels"):
        next(scan(replace(artefact, image_shape=(4, 8, 8)), image_files([path])))


def test_bad_files_are_named_and_the_rest_is_done(artefact, folder):
    path, _ = folder
    (path / "bomb.png").write_bytes(png_header(30_000, 30_000))
    (path / "cut.png").write_bytes((path / "00.png").read_bytes()[:60])
    (path / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (path / "empty.jpg").write_bytes(b"")
    Image.new("L", (9, 8)).save(path / "wide.png")
    rows = {row.path.rpartition("/")[2]: row for row in scan(artefact, image_files([path, path / "absent.png"]))}
    assert len(rows) == 36
    errors = {name: row.error for name, row in rows.items() if row.error is not None}
    assert set(errors) == {"bomb.png", "cut.png", "drawing.png", "empty.jpg", "wide.png", "absent.png"}
    assert errors["bomb.png"].startswith("has too many pixels (")
    assert errors["wide.png"].startswith("9 x 8 pixels, the model takes 8 x 8")
    assert errors["absent.png"] == "no such file"
    assert all(errors[name].startswith("not a readable image (") for name in ("cut.png", "drawing.png", "empty.jpg"))
    assert rows["cut.png"].decision is None


def test_resizing_is_asked_for_and_has_a_limit(artefact, tmp_path):
    Image.new("RGB", (40, 30), (90, 90, 90)).save(tmp_path / "large.png")
    (tmp_path / "bomb.png").write_bytes(png_header(30_000, 30_000))
    rows = {row.path.rpartition("/")[2]: row for row in scan(artefact, image_files([tmp_path]), resize=True)}
    assert rows["large.png"].error is None
    assert rows["bomb.png"].error is not None


def test_files_are_read_as_they_are_asked_for(artefact, folder):
    path, _ = folder
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield path / "00.png"

    rows = list(islice(scan(artefact, endless(), batch_size=5), 12))
    assert len(rows) == 12
    assert len(asked) == 15


def test_links_out_of_the_folder_are_named_and_hidden_files_left_out(artefact, folder, tmp_path_factory):
    path, _ = folder
    outside = tmp_path_factory.mktemp("outside")
    Image.new("L", (8, 8)).save(outside / "secret.png")
    (path / "link.png").symlink_to(outside / "secret.png")
    (path / "inside.png").symlink_to(path / "00.png")
    (path / "folder").symlink_to(outside)
    Image.new("L", (8, 8)).save(path / ".hidden.png")
    (path / "notes.txt").write_text("no image")
    (path / "ring.png").symlink_to(path / "ring.png")
    found = list(image_files([path]))
    names = {name.rpartition("/")[2] for name in found if isinstance(name, str)}
    assert names == {f"{number:02}.png" for number in range(30)} | {"inside.png"}
    left_out = [file for file in found if isinstance(file, LeftOut)]
    assert {file.path.rpartition("/")[2] for file in left_out} == {"link.png", "folder", "ring.png"}
    (row,) = scan(artefact, left_out[:1])
    assert row.error == "a link that leads out of the folder"


@pytest.mark.timeout(20)
def test_a_pipe_is_named_and_nothing_waits_for_it(artefact, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (row,) = scan(artefact, image_files([tmp_path]))
    assert row.error == "is not a regular file"
    (row,) = scan(artefact, ["/dev/zero"])
    assert row.error == "is not a regular file"


def test_a_large_folder_is_never_held_as_a_whole(monkeypatch):
    """Ten million entries that exist nowhere but here: they are made as they are asked for."""
    made = []

    class Entry:
        def __init__(self, number):
            made.append(number)
            self.name, self.path = f"{number}.png", f"/many/{number}.png"

        def is_symlink(self):
            return False

        def is_dir(self, follow_symlinks=True):
            return False

    class Many:
        def __enter__(self):
            return (Entry(number) for number in range(10_000_000))

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("os.scandir", lambda _: Many())
    monkeypatch.setattr("pathlib.Path.is_dir", lambda _: True)
    assert list(islice(image_files(["/many"]), 3)) == ["/many/0.png", "/many/1.png", "/many/2.png"]
    assert len(made) <= 4


def test_settings_that_make_no_sense_are_refused(artefact):
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        list(scan(artefact, [], batch_size=0))


def test_images_keep_their_values(artefact, folder):
    """What is scanned are the stored bytes over 255: the model sees what training saw."""
    path, images = folder
    seen = []
    handle = artefact.served.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    try:
        list(scan(artefact, sorted(image_files([path]))))
    finally:
        handle.remove()
    assert torch.equal(seen[0], images)


def test_a_reader_that_has_enough_ends_the_rows_without_a_word(monkeypatch, capsys):
    closed = []

    def rows(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(artefact_commands, "_scan", rows)
    monkeypatch.setattr("os.dup2", lambda source, target: closed.append(target))
    assert artefact_commands.main("scan", []) == 128 + signal.SIGPIPE
    assert closed == [1]
    assert capsys.readouterr() == ("", "")
