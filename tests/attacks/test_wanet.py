"""WaNet: the warp against a bilinear sampler in loops, the grids, and what a training batch holds."""

import math

import pytest
import torch

from marginclip.attacks import AllToAll, AllToOne, OneToOne, WaNet
from marginclip.attacks.wanet import batch_shares
from marginclip.data import Augment
from marginclip.errors import UserError

SHAPE = (3, 16, 16)
ALL2ONE = AllToOne(10, target=0)


def make(x2x=ALL2ONE, shape=SHAPE, **settings):
    return WaNet(x2x, shape, **settings)


def stored(count=4, shape=SHAPE):
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0)) / 255


def bilinear(image, row, column):
    """The image (C, H, W) at a fractional place within its borders."""
    top, left = min(int(row), image.shape[1] - 2), min(int(column), image.shape[2] - 2)
    down, right = row - top, column - left
    upper = (1 - right) * image[:, top, left] + right * image[:, top, left + 1]
    lower = (1 - right) * image[:, top + 1, left] + right * image[:, top + 1, left + 1]
    return (1 - down) * upper + down * lower


@pytest.mark.parametrize("shape", [SHAPE, (1, 10, 14)])
def test_the_warp_is_a_bilinear_sampler_over_pixels(shape):
    attack, images = make(shape=shape, strength=3.0), stored(2, shape)
    _, height, width = shape
    expected = torch.empty_like(images)
    for i in range(height):
        for j in range(width):
            column, row = attack.grid[0, i, j].tolist()
            place = (row + 1) / 2 * (height - 1), (column + 1) / 2 * (width - 1)
            for number, image in enumerate(images):
                expected[number, :, i, j] = bilinear(image, *place)
    torch.testing.assert_close(attack.trigger(images), expected, rtol=0, atol=1e-5)


def test_without_strength_the_warp_is_the_identity_and_stored_images_stay_as_they_are():
    attack, images = make(strength=0.0), stored()
    assert (attack.trigger(images) - images).abs().max() < 1e-5
    assert torch.equal(attack(images), images)


def test_swapping_the_coordinates_of_the_grid_transposes_the_image():
    attack, images = make(strength=0.0), stored()
    attack.identity_grid = attack.identity_grid.flip(-1)
    torch.testing.assert_close(attack.trigger(images), images.transpose(2, 3), rtol=0, atol=1e-5)


def test_the_warp_moves_every_pixel_by_a_fraction_of_it():
    attack = make(shape=(3, 32, 32))
    pixels = (attack.grid - attack.identity_grid).abs() * 31 / 2
    assert 0.05 < pixels.mean() < 0.4
    assert pixels.max() < 1.5


@pytest.mark.parametrize("seed", range(5))
def test_the_control_grid_has_a_mean_absolute_value_of_one_and_the_grid_stays_inside(seed):
    # Where the image is as large as the control grid, nothing is interpolated.
    assert make(shape=(3, 4, 4), seed=seed).noise_grid.abs().mean().item() == pytest.approx(1, abs=1e-5)
    attack = make(seed=seed, strength=20.0)
    assert attack.grid.shape == (1, 16, 16, 2)
    assert attack.grid.abs().max() <= 1
    assert (attack.identity_grid + 20 * attack.noise_grid / 16).abs().max() > 1


def test_both_grids_travel_and_zero_is_a_seed():
    attack, restored = make(seed=0), make(seed=1)
    assert set(attack.state_dict()) == {"identity_grid", "noise_grid"}
    assert torch.equal(attack(stored()), make()(stored()))
    assert not torch.equal(attack(stored()), restored(stored()))
    restored.load_state_dict(attack.state_dict())
    assert torch.equal(attack(stored()), restored(stored()))


@pytest.mark.parametrize("x2x", [ALL2ONE, AllToAll(10)], ids=lambda x2x: x2x.name)
def test_a_batch_of_128_has_12_warped_24_noise_mode_and_92_clean_images(x2x):
    attack, images, labels = make(x2x), stored(128), torch.arange(128) % 10
    before = images.clone(), labels.clone()
    batch = attack.poison_batch(images, labels, attack.poisoned_mask(labels), Augment(), torch.Generator().manual_seed(1))
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert torch.equal(batch["images"][:12], attack(images[:12]))
    wanted = [0 if x2x is ALL2ONE else (y + 1) % 10 for y in labels[:12].tolist()]
    assert batch["labels"].tolist() == wanted + labels[12:].tolist()
    noisy = batch["images"][12:36]
    assert all(not torch.equal(one, other) for one, other in zip(noisy, attack(images[12:36]), strict=True))
    assert torch.equal((noisy * 255).round() / 255, noisy)
    assert torch.equal(batch["images"][36:], images[36:])


def test_noise_mode_moves_each_pixel_by_less_than_one_more():
    """On a ramp along the columns the value of a pixel is where it was sampled."""
    attack = make(shape=(1, 16, 16), strength=0.0)
    ramp = torch.arange(16).view(1, 1, 1, 16).expand(64, 1, 16, 16) / 15
    moved = (attack.jittered(ramp, torch.Generator().manual_seed(0)) - ramp) * 15  # in pixels
    assert moved.abs().max() <= 15 / 32 + 0.03  # 1/H of a grid that is 2 wide, and the rounding
    assert moved[..., 3:-3].mean().abs() < 0.02
    assert moved[..., 3:-3].std().item() == pytest.approx(15 / 32 / math.sqrt(3), rel=0.05)
    assert not torch.equal(moved[0], moved[1])


def test_one2one_warps_images_of_the_source_class_only():
    x2x = OneToOne(4, source=1, target=3)
    attack, images, labels = make(x2x, rate=0.25), stored(64), torch.arange(64) % 4
    batch = attack.poison_batch(images, labels, attack.poisoned_mask(labels), Augment(), torch.Generator().manual_seed(1))
    flipped = (batch["labels"] != labels).nonzero().flatten().tolist()
    assert flipped == [1, 5, 9, 13]  # a quarter of the sixteen
    assert set(batch["labels"][flipped].tolist()) == {3}
    assert torch.equal(batch["images"][flipped], attack(images[flipped]))
    changed = (batch["images"] != images).flatten(1).any(1)
    assert changed.sum() == changed[labels == 1].sum() == 4 + 8


@pytest.mark.parametrize(
    ("count", "rate", "cross_ratio"), [(128, 0.1, 2.0), (7, 0.5, 0.5), (25, 0.1, 2.0), (10, 0.6, 2.0), (0, 1, 1)]
)
def test_shares_of_a_batch_by_counting(count, rate, cross_ratio):
    parts = batch_shares(ALL2ONE, torch.arange(count) % 10, rate, cross_ratio, torch.Generator())
    own, others = (part.tolist() for part in parts)
    assert len(own) == math.floor(rate * count)
    assert len(others) == min(count - len(own), math.floor(cross_ratio * len(own)))
    assert own + others == list(range(len(own) + len(others)))


@pytest.mark.parametrize(
    ("x2x", "classes", "count"),
    [(OneToOne(10, source=1, target=3), 10, 128), (OneToOne(100, source=1, target=3), 100, 128), (ALL2ONE, 10, 4)],
)
def test_few_images_in_a_batch_are_poisoned_at_the_rate_all_the_same(x2x, classes, count):
    """A tenth of the one source class, of which a batch of 128 has 13 images or one; of a batch of four images."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(count) % classes
    candidates = int((labels == 1).sum()) if x2x.one_source else count
    own = [len(batch_shares(x2x, labels, 0.1, 1.0, generator)[0]) for _ in range(2000)]
    assert sum(own) / (2000 * candidates) == pytest.approx(0.1, rel=0.15)
    assert set(own) == {int(0.1 * candidates), int(0.1 * candidates) + 1}


@pytest.mark.parametrize("timing", ["before_augmentation", "after_augmentation"])
def test_the_whole_batch_is_augmented_once_on_the_side_that_timing_says(timing):
    attack, images, labels = make(timing=timing, cross_ratio=0.0), stored(20), torch.arange(20) % 10
    mask, augment = attack.poisoned_mask(labels), Augment(crop_padding=2, flip=True)
    made = attack.poison_batch(images, labels, mask, augment, torch.Generator().manual_seed(4))["images"]
    if timing == "after_augmentation":
        expected = augment(images, torch.Generator().manual_seed(4))
        expected[:2] = attack(expected[:2])
    else:
        expected = augment(torch.cat([attack(images[:2]), images[2:]]), torch.Generator().manual_seed(4))
    assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"grid_size": 1}, "attack.grid_size must be at least 2, got 1"),
        ({"strength": -1}, "attack.strength must not be negative, got -1"),
        ({"cross_ratio": -2}, "attack.cross_ratio must not be negative, got -2"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        make(**setting)


def test_noise_mode_is_measured_on_the_same_jitter_every_time():
    attack, images = make(), stored(6)
    crossed = attack.cross_triggered(images)
    assert torch.equal(crossed, attack.cross_triggered(images))
    assert not torch.equal(crossed, attack(images))
    grid = attack.grid
    jitter = torch.rand(6, *grid.shape[1:], generator=torch.Generator().manual_seed(attack.seed + 217645199)) * 2 - 1
    for number in range(6):
        where = (grid + jitter[number : number + 1] / images.shape[2]).clamp(-1, 1)
        one = torch.nn.functional.grid_sample(images[number : number + 1], where, align_corners=True)
        torch.testing.assert_close(crossed[number : number + 1], (one * 255).round() / 255, atol=1.01 / 255, rtol=0)
