"""Batched augmentation against a loop that pads, cuts and flips one image at a time with the same draws."""

import math

import pytest
import torch

from marginclip.data.augment import Augment, rotated
from marginclip.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_by_one(images, padding, flip, draws):
    count, channels, height, width = images.shape
    shifts = torch.randint(0, 2 * padding + 1, (2, count), generator=draws) if padding else torch.zeros(2, count)
    flips = torch.rand(count, generator=draws) < 0.5 if flip else torch.zeros(count)
    result = torch.zeros_like(images)
    for number, (row, column, turned) in enumerate(zip(*shifts.tolist(), flips.tolist(), strict=True)):
        padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding)
        padded[:, padding : padding + height, padding : padding + width] = images[number]
        cut = padded[:, int(row) : int(row) + height, int(column) : int(column) + width]
        result[number] = cut[:, :, range(width - 1, -1, -1)] if turned else cut
    return result


@pytest.mark.parametrize("shape", [(40, 3, 8, 8), (7, 1, 5, 9), (1, 3, 8, 8)])
@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (2, False), (4, True)])
def test_batch_equals_the_loop(shape, padding, flip):
    images = torch.rand(shape)
    before = images.clone()
    augmented = Augment(crop_padding=padding, flip=flip)(images, generator())
    assert augmented.shape == images.shape
    assert torch.equal(augmented, one_by_one(images, padding, flip, generator()))
    assert torch.equal(images, before)


def test_draws_differ_between_images_and_come_from_the_generator_alone():
    images, augment = torch.rand(1, 3, 8, 8).expand(64, -1, -1, -1), Augment(crop_padding=2, flip=True)
    torch.manual_seed(1)
    first, again, other = augment(images, generator()), augment(images, generator()), augment(images, generator(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 30 <= len(first.unique(dim=0)) <= 50  # of 5 x 5 shifts, flipped or not


def test_no_padding_is_given_as_a_negative_number():
    with pytest.raises(UserError, match="must not be negative, got -1"):
        Augment(crop_padding=-1)


def test_quarter_and_half_turns_move_pixels_whole():
    images = torch.rand(3, 2, 6, 6)
    angles = torch.tensor([0.0, math.pi / 2, math.pi])
    wanted = torch.stack([torch.rot90(image, turns, (1, 2)) for turns, image in enumerate(images)])
    torch.testing.assert_close(rotated(images, angles), wanted, atol=1e-5, rtol=0)
    wide = torch.rand(1, 1, 4, 8)
    torch.testing.assert_close(rotated(wide, torch.tensor([math.pi])), wide.flip(2, 3), atol=1e-5, rtol=0)


def test_half_of_the_images_are_turned_by_up_to_the_angle():
    images = torch.zeros(400, 1, 21, 21)
    images[:, :, 10, 20] = 1  # the middle of the right edge
    turned = Augment(rotation=20.0)(images, generator())
    still = (turned - images).abs().amax((1, 2, 3)) < 1e-6
    assert 160 < int(still.sum()) < 240
    rows = torch.arange(21.0).view(1, 21, 1)
    heights = (turned[:, 0] * rows).sum((1, 2)) / turned[:, 0].sum((1, 2)) - 10
    assert float(heights.abs().max()) < 10.5 * math.sin(math.radians(20))
    assert float(heights[~still].abs().max()) > 0.8 * 10 * math.sin(math.radians(20))
    assert torch.equal(Augment()(images, generator()), images)


@pytest.mark.parametrize("angle", [0, -5, 200])
def test_angles_that_make_no_sense_are_refused(angle):
    with pytest.raises(UserError, match=r"dataset.augment.rotation must be null or in \(0, 180\]"):
        Augment(rotation=angle)
