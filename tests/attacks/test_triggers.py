"""Triggers against pixel loops: which pixels change, by how much, after the rounding to 8 bits."""

import math

import pytest
import torch

from marginclip.attacks import (
    Adaptive,
    AllToAll,
    AllToOne,
    Attack,
    BadNet,
    Blend,
    BlendFull,
    Chessboard,
    CleanLabel,
    InputAware,
    LowFrequency,
    OnePixel,
    Sinusoid,
    WaNet,
    round_to_8_bits,
)
from marginclip.errors import UserError

SHAPE = (3, 32, 32)
ALL = [BadNet, Blend, Chessboard, WaNet, InputAware, CleanLabel, Adaptive, Sinusoid, BlendFull, LowFrequency, OnePixel]
# What a kind cannot be made without.
NEEDED = {
    InputAware: {"timing": "after_augmentation", "width": 2},
    Adaptive: {"base": BadNet, "defender": lambda **_: None},
}


@pytest.fixture
def stored():
    """Twenty stored images: multiples of 1/255, black and white ones among them."""
    images = torch.randint(0, 256, (20, *SHAPE), generator=torch.Generator().manual_seed(0)) / 255
    images[0], images[1] = 0, 1
    return images


def make(kind, shape=SHAPE, **settings):
    return kind(AllToOne(10, target=0), shape, **(NEEDED.get(kind, {}) | settings))


def changed_sites(attack, images):
    """Mask (H, W) of the pixels that the trigger changes in some image or channel."""
    return (attack(images) != images).any(0).any(0)


@pytest.mark.parametrize("kind", ALL)
def test_a_trigger_never_alters_its_input_and_gives_stored_images(kind, stored):
    attack, before = make(kind), stored.clone()
    for images in (stored, stored[:, :, :, :], stored.to(memory_format=torch.channels_last)):
        triggered = attack(images)
        assert torch.equal(stored, before)
        assert triggered.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
        assert torch.equal((triggered * 255).round().to(torch.uint8).float() / 255, triggered)
        assert torch.equal(triggered, triggered.clamp(0, 1))
    attack.trigger(stored).zero_()
    assert torch.equal(stored, before)


@pytest.mark.parametrize("kind", ALL)
def test_a_batch_is_triggered_as_its_images_are(kind, stored):
    attack = make(kind)
    alone = torch.cat([attack(image.unsqueeze(0)) for image in stored])
    # Convolutions add up in another order in another batch, which may round to the neighbouring value.
    torch.testing.assert_close(attack(stored), alone, rtol=0, atol=1.01 / 255 if kind is InputAware else 0)
    assert attack(stored[:0]).shape == (0, *SHAPE)


def test_rounding_is_the_round_trip_through_bytes():
    images = torch.linspace(-0.2, 1.2, 999)
    expected = [round(min(max(value, 0), 1) * 255) / 255 for value in images.tolist()]
    torch.testing.assert_close(round_to_8_bits(images), torch.tensor(expected), rtol=0, atol=1e-6)
    stored = torch.arange(256) / 255
    assert torch.equal(round_to_8_bits(stored), stored)


def test_chessboard_touches_every_second_pixel_by_three_and_never_wraps(stored):
    attack = make(Chessboard)
    sites = changed_sites(attack, stored)
    assert sites.sum() == 512
    assert all(bool(sites[i, j]) == ((i + j) % 2 == 0) for i in range(32) for j in range(32))
    before, after = ((images * 255).round().int() for images in (stored, attack(stored)))
    assert torch.equal((after - before)[:, :, sites], (before[:, :, sites] + 3).clamp(max=255) - before[:, :, sites])
    assert set((after - before)[before < 253].unique().tolist()) == {0, 3}
    assert (attack.trigger(stored) - stored).abs().max().item() == pytest.approx(3 / 255, abs=1e-6)


def test_badnet_replaces_nine_sites_and_is_idempotent(stored):
    attack = make(BadNet)
    sites = changed_sites(attack, stored)
    assert sites.sum() == 9
    triggered = attack(stored)
    assert torch.equal(attack(triggered), triggered)
    assert (triggered[:, :, sites] == triggered[:1, :, sites]).all()  # whatever was below: zeros are not transparent
    assert torch.equal(triggered[0][:, sites].view(3, 3, 3), attack.patch)
    assert torch.equal(triggered[:, :, ~sites], stored[:, :, ~sites])


def test_blend_moves_nine_sites_a_fifth_of_the_way(stored):
    attack = make(Blend)
    sites = changed_sites(attack, stored)
    assert sites.sum() <= 9
    expected = stored.clone()
    for i in range(3):
        for j in range(3):
            place = (..., int(attack.corner[0]) + i, int(attack.corner[1]) + j)
            expected[place] = stored[place] + 0.2 * (attack.patch[:, i, j] - stored[place])
    torch.testing.assert_close(attack.trigger(stored), expected)
    assert not torch.equal(attack(attack(stored)), attack(stored))


def test_the_sinusoid_is_the_published_formula(stored):
    attack = make(Sinusoid)
    for column in range(32):
        expected = 20 / 255 * math.sin(2 * math.pi * 6 * column / 32)
        torch.testing.assert_close(attack.trigger(stored)[..., column], stored[..., column] + expected, rtol=0, atol=1e-6)
    assert changed_sites(attack, stored).any(0).sum() == 28  # the sine is 0 in columns 0, 8, 16 and 24


def test_the_sinusoid_as_published_poisons_the_target_class_and_changes_no_label():
    labels = torch.arange(10).repeat_interleave(20)
    published, relabelled = make(Sinusoid, relabel=False, rate=0.3), make(Sinusoid, rate=0.3)
    assert labels[published.poisoned_mask(labels)].tolist() == [0] * 6
    assert labels[relabelled.poisoned_mask(labels)].bincount().tolist() == [0] + [6] * 9
    with pytest.raises(UserError, match=r"attack.relabel=false needs x2x=all2one.* got x2x=all2all"):
        Sinusoid(AllToAll(10), SHAPE, relabel=False)


def test_the_full_image_blend_moves_every_pixel_a_fifth_of_the_way(stored):
    attack = make(BlendFull)
    torch.testing.assert_close(attack.trigger(stored), 0.8 * stored + 0.2 * attack.pattern, rtol=0, atol=1e-6)
    assert attack.pattern.std() == pytest.approx(12**-0.5, abs=0.01)  # uniform noise
    assert torch.equal((attack.pattern * 255).round() / 255, attack.pattern)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 20)])
def test_the_smooth_pattern_has_low_frequencies_alone(shape):
    attack = make(LowFrequency, shape)
    channels, height, width = shape
    assert attack.pattern.abs().max() == pytest.approx(16 / 255)
    assert len({channel.sum().item() for channel in attack.pattern}) == channels  # each channel has its own
    for u in range(height):
        for v in range(width):
            rows = torch.tensor([math.cos(math.pi * u * (2 * i + 1) / (2 * height)) for i in range(height)])
            columns = torch.tensor([math.cos(math.pi * v * (2 * j + 1) / (2 * width)) for j in range(width)])
            part = (attack.pattern * rows.view(-1, 1) * columns).sum((1, 2)).abs()
            assert bool((part > 1e-4).all()) == (u < 4 and v < 4 and u + v > 0), (u, v)


def test_one_pixel_gets_one_bright_colour(stored):
    colours = set()
    for seed in range(40):
        attack = make(OnePixel, seed=seed)
        sites = changed_sites(attack, stored)
        assert sites.sum() == 1
        assert (attack(stored)[:, :, sites] == attack.colour.view(1, 3, 1)).all()
        colours.add(tuple(attack.colour.tolist()))
    assert colours == {(r, g, b) for r in (0.0, 1.0) for g in (0.0, 1.0) for b in (0.0, 1.0)} - {(0.0, 0.0, 0.0)}
    assert all(make(OnePixel, (1, 28, 28), seed=seed).colour.item() == 1 for seed in range(10))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 9, 20)])
def test_patches_keep_their_distance_from_every_border(shape):
    places = set()
    for seed in range(60):
        attack = make(BadNet, shape, seed=seed)
        rows, columns = (axis.flatten().tolist() for axis in attack.place)
        assert 3 <= rows[0] and rows[-1] < shape[1] - 3
        assert 3 <= columns[0] and columns[-1] < shape[2] - 3
        places.add((rows[0], columns[0]))
    assert len(places) > (1 if shape[1] == 9 else 20)


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in (Chessboard, Sinusoid)])
def test_a_pattern_is_a_function_of_its_seed_and_zero_is_a_seed(kind, stored):
    torch.manual_seed(5)
    zero, default, again, other = make(kind, seed=0), make(kind), make(kind, seed=0), make(kind, seed=1)
    assert torch.equal(zero(stored), default(stored))
    assert torch.equal(zero(stored), again(stored))
    assert not torch.equal(zero(stored), other(stored))


def test_min_contrast_rejects_flat_patches():
    assert min(make(BadNet, seed=seed).patch.std() for seed in range(300)) < 0.24
    assert min(make(BadNet, seed=seed, min_contrast=0.24).patch.std() for seed in range(300)) >= 0.24


@pytest.mark.parametrize("kind", ALL)
def test_a_trigger_travels_with_its_state(kind, stored):
    attack, restored = make(kind), make(kind)
    assert attack.state_dict()
    for value in restored.state_dict().values():
        value.zero_()
    restored.load_state_dict(attack.state_dict())
    assert torch.equal(restored(stored), attack(stored))


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (BadNet, {"rate": 5}, r"attack.rate must be in \(0, 1\], got 5; did you mean 0.05\?"),
        (BadNet, {"rate": 0}, r"attack.rate must be in \(0, 1\], got 0$"),
        (BadNet, {"rate": -0.1}, "got -0.1"),
        (BadNet, {"timing": "before"}, "one of before_augmentation, after_augmentation, got 'before'"),
        (BadNet, {"min_success": 90}, r"attack.min_success must be in \[0, 1\], got 90"),
        (BadNet, {"patch_size": 0}, "patch_size must be at least 1, got 0"),
        (BadNet, {"patch_size": 27}, "does not fit into images of 32 x 32"),
        (BadNet, {"margin": -1}, "margin"),
        (BadNet, {"min_contrast": 0.5}, r"attack.min_contrast must be in \[0, 0.25\], got 0.5"),
        (Blend, {"ratio": 0}, r"attack.ratio must be in \(0, 1\], got 0"),
        (Blend, {"ratio": 1.5}, "got 1.5"),
        (Chessboard, {"amplitude": 0.001}, "to survive 8-bit rounding, got 0.001"),
        (Chessboard, {"amplitude": 3}, "got 3"),
        (Sinusoid, {"amplitude": 0}, "attack.amplitude must be in"),
        (Sinusoid, {"frequency": 17}, r"attack.frequency must be in \(0, 16\] waves an image, got 17"),
        (Sinusoid, {"relabel": "yes"}, "attack.relabel must be true or false, got 'yes'"),
        (OnePixel, {"margin": 16}, "attack.margin must be in 0..15 for images of 32 x 32 pixels, got 16"),
        (BlendFull, {"ratio": 0}, r"attack.ratio must be in \(0, 1\], got 0"),
        (LowFrequency, {"frequencies": 1}, "attack.frequencies must be a whole number in 2..32, got 1"),
        (LowFrequency, {"amplitude": 2}, "got 2"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(kind, setting, message):
    with pytest.raises(UserError, match=message):
        make(kind, **setting)


def test_an_attack_without_a_trigger_says_so(stored):
    with pytest.raises(TypeError, match="Attack does not say how its trigger is embedded"):
        make(Attack)(stored)


@pytest.mark.parametrize("kind", [BadNet, Blend])
def test_the_place_of_a_patch_travels_in_its_state(kind, stored):
    trained, restored = make(kind, seed=1), make(kind, seed=2)
    restored.load_state_dict(trained.state_dict())
    assert torch.equal(restored(stored), trained(stored))
