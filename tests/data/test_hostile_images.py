"""Images that somebody made to do harm, or by mistake: read rightly or refused by name, in bounded time and memory."""

import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from marginclip.data import ImageFolder
from marginclip.data.images import pixels_of
from marginclip.errors import UserError, printable


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_png(path, side=30_000):
    """A header that claims ``side`` x ``side`` pixels before a few bytes of them."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    )


def truncated_jpeg(path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, format="jpeg")
    path.write_bytes(path.read_bytes()[:900])


@pytest.fixture
def root(tmp_path):
    """Two classes of four images."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def load(root, **settings):
    return ImageFolder(root=str(root), held_out_share=1.0, **settings).load().held_out


@pytest.mark.parametrize("memory_gib", [4.0, 1e-9], ids=["in memory", "streaming"])
@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (huge_png, "x.png", "x.png' has too many pixels"),
        (lambda path: huge_png(path, 9_000), "x.png", "x.png' has 9000 x 9000 pixels, which are too many"),
        (truncated_jpeg, "x.jpg", "x.jpg' is corrupt"),
        (lambda path: path.write_bytes(b""), "x.png", "x.png' is not an image"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500)), "x.png", "x.png' is"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_harm_are_refused_by_name(root, make, name, message, memory_gib):
    make(root / "dog" / name)
    started = time.process_time()
    with pytest.raises(UserError, match=message):
        load(root, size=16, memory_gib=memory_gib).images[torch.arange(9)]
    assert time.process_time() - started < 5


def test_a_first_image_that_harms_is_refused_too(root):
    huge_png(root / "cat" / "+.png")
    with pytest.raises(UserError, match=r"\+.png' is not a readable image"):
        load(root)


def test_colours_of_print_and_moving_pictures_are_read(root):
    colours = [Image.new("RGB", (16, 16), name) for name in ("red", "blue")]
    colours[0].save(root / "dog" / "x.gif", save_all=True, append_images=colours[1:])
    colours[0].convert("CMYK").save(root / "dog" / "y.jpg")
    images = load(root).images[torch.tensor([8, 9])]
    assert images.shape == (2, 3, 16, 16)
    expected = torch.tensor([255, 0, 0]).view(1, 3, 1, 1)
    assert (images.int() - expected).abs().max() <= 3, "the first picture, in red"


@pytest.mark.parametrize("turned", range(1, 9))
def test_photographs_stand_upright(root, turned):
    """A camera stores the pixels as they come, and says how it was held; the same image upright is the last one."""
    upright = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[:, None], 16, 1)).convert("RGB")
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # as Image.Transpose; what turns the upright image into the stored one
    stored = upright if turned == 1 else upright.transpose(Image.Transpose(undone[turned]))
    exif = Image.Exif()
    exif[0x0112] = turned
    assert pixels_of_saved(stored, root / "dog" / "x.png", exif) == (16, 24)
    upright.save(root / "dog" / "y.png")
    images = load(root, size=16).images[torch.tensor([8, 9])]
    assert torch.equal(images[0], images[1])


def pixels_of_saved(image, path, exif):
    image.save(path, exif=exif)
    return pixels_of(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_cost_the_image(root):
    file = root / "dog" / "x.jpg"
    Image.new("RGB", (16, 16), "red").save(file, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff nonsense")
    assert len(load(root)) == 9


def test_names_that_are_not_unicode_are_files_like_others(root, tmp_path):
    os.rename(os.fsencode(root / "dog" / "0.png"), os.fsencode(root / "dog") + b"/caf\xe9.png")
    settings = {"root": str(root), "held_out_share": 1.0, "cache": str(tmp_path / "cache")}
    assert len(ImageFolder(**settings).load().held_out) == 8
    before = ImageFolder(**settings).digest()
    os.rename(os.fsencode(root / "dog") + b"/caf\xe9.png", os.fsencode(root / "dog") + b"/caf\xe8.png")
    assert ImageFolder(**settings).digest() != before


def test_links_are_followed_to_files_and_not_in_circles(root, tmp_path):
    """A link to a file is that file, as in folders of links to a larger data set; one to a folder below a class is left out."""
    os.symlink(root / "cat" / "0.png", root / "dog" / "linked.png")
    os.symlink(tmp_path / "nowhere.png", root / "dog" / "broken.png")
    os.symlink(root, root / "dog" / "circle")
    images = load(root)
    assert len(images) == 9
    assert torch.equal(images.images[torch.tensor([0])], images.images[torch.tensor([8])])
    os.symlink("..", root / "loop")
    with pytest.raises(UserError, match="loop' is a link to a folder that it lies in"):
        load(root)


def test_names_can_hold_anything_and_are_told_on_one_line(root):
    name = "new\nline \x1b[31m ä.png"
    (root / "dog" / name).write_text("no image")
    with pytest.raises(UserError) as caught:
        load(root)
    told = printable(str(caught.value))
    assert r"new\nline \x1b[31m ä.png' is not an image" in told
    (root / "dog" / name).unlink()
    os.rename(root / "dog", root / "do\ng")
    assert load(root).classes == ("cat", "do\ng")
