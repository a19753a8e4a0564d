"""The input-aware trigger: mask and pattern, the diversity loss by hand, and what a joint batch holds."""

import pytest
import torch

from marginclip.attacks import AllToOne, InputAware, OneToOne, round_to_8_bits
from marginclip.attacks.input_aware import diversity_loss
from marginclip.data import Augment
from marginclip.errors import UserError

SHAPE = (3, 16, 16)


def make(x2x=None, shape=SHAPE, **settings):
    """An attack whose networks are as if trained: batch norm knows the activations, so that triggers differ between images."""
    attack = InputAware(x2x or AllToOne(10, target=0), shape, **({"timing": "after_augmentation", "width": 4} | settings))
    norms = [module for module in attack.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        attack.train().trigger(stored(16, shape))
    return attack.eval()


def stored(count=4, shape=SHAPE):
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0)) / 255


@pytest.mark.parametrize("shape", [SHAPE, (1, 9, 14)])
def test_mask_and_pattern_are_in_the_unit_interval_and_another_for_every_image(shape):
    attack, images = make(shape=shape), stored(4, shape)
    mask, pattern = attack.mask(images), attack.pattern(images)
    assert mask.shape == (4, 1, *shape[1:])
    assert pattern.shape == images.shape
    for values in (mask, pattern):
        assert 0 <= values.min() < values.max() <= 1
        assert not torch.equal(values[0], values[1])


def test_an_image_is_left_alone_where_the_mask_is_zero_and_painted_where_it_is_one(monkeypatch):
    attack, images = make(), stored()
    holes = (torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    monkeypatch.setattr(attack, "mask", lambda _: holes)
    expected = torch.where(holes == 1, round_to_8_bits(attack.pattern(images)), images)
    torch.testing.assert_close(attack(images), expected)
    assert torch.equal(attack(images)[(holes == 0).expand_as(images)], images[(holes == 0).expand_as(images)])


def test_a_trigger_is_mixed_in_by_the_share_of_the_mask():
    attack, images = make(), stored()
    mask, pattern = attack.mask(images), attack.pattern(images)
    torch.testing.assert_close(attack.trigger(images), (1 - mask) * images + mask * pattern)


def test_cross_triggers_are_those_of_the_image_before():
    attack, images = make(), stored(3)
    expected = []
    for number, image in enumerate(images):
        other = images[number - 1].unsqueeze(0)
        mask = attack.mask(other)
        expected.append(round_to_8_bits((1 - mask) * image + mask * attack.pattern(other)))
    torch.testing.assert_close(attack.cross_triggered(images), torch.cat(expected), rtol=0, atol=1.01 / 255)
    assert not torch.equal(attack.cross_triggered(images), attack(images))


def test_the_diversity_loss_by_loops():
    generator = torch.Generator().manual_seed(2)
    images, others = (torch.rand(5, 3, 4, 4, generator=generator) for _ in range(2))
    maps, other_maps = (torch.rand(5, 1, 4, 4, generator=generator) for _ in range(2))

    def rms(values):
        return (sum(v**2 for v in values.flatten().tolist()) / values.numel()) ** 0.5

    pairs = zip(images - others, maps - other_maps, strict=True)
    expected = sum(rms(image) / rms(each) for image, each in pairs) / 5
    assert diversity_loss(images, others, maps, other_maps).item() == pytest.approx(expected, rel=1e-4)


def test_identical_pairs_have_a_finite_loss_and_gradient():
    images = stored(2)
    maps = torch.full((2, 1, 16, 16), 0.5, requires_grad=True)
    for others in (images, images.flip(0)):
        loss = diversity_loss(images, others, maps, maps.detach().clone())
        assert torch.isfinite(loss)
        (gradient,) = torch.autograd.grad(loss, maps)
        assert torch.isfinite(gradient).all()


def test_the_mask_loss_is_the_excess_over_the_density_and_the_diversity():
    attack, images = make(density=0.1, density_weight=7.0), stored(3)
    masks = attack.mask(images)
    excess = sum(max(0.0, value - 0.1) for value in masks.flatten().tolist()) / masks.numel()
    order = [2, 0, 1]
    expected = 7 * excess + diversity_loss(images, images[order], masks, masks[order]).item()
    assert attack.mask_loss(images).item() == pytest.approx(expected, rel=1e-4)


def test_a_joint_batch_holds_own_triggers_then_cross_triggers_then_clean_images():
    attack, images, labels = make(rate=0.25, cross_ratio=0.5), stored(16), torch.arange(16) % 10
    before = images.clone(), labels.clone()
    made, wanted, diversity = attack.joint_batch(images, labels, torch.Generator())
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert wanted.tolist() == [0] * 4 + labels[4:].tolist()
    torch.testing.assert_close(made[:4], attack(images[:4]), rtol=0, atol=1.01 / 255)
    torch.testing.assert_close(made[4:6], attack.cross_triggered(images)[4:6], rtol=0, atol=1.01 / 255)
    assert torch.equal(made[6:], images[6:])
    patterns, others = attack.pattern(images[:2]), attack.pattern(images[[3, 4]])
    expected = diversity_loss(images[:2], images[[3, 4]], patterns, others)
    assert diversity.item() == pytest.approx(expected.item(), rel=1e-3)


def test_painting_in_training_is_rounded_and_has_the_gradient_of_what_is_not():
    attack, images, labels = make(rate=0.5, cross_ratio=0.0), stored(8), torch.arange(8) % 10
    made, _, _ = attack.joint_batch(images, labels, torch.Generator())
    torch.testing.assert_close((made * 255).round() / 255, made.detach(), rtol=0, atol=1e-6)
    weights = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(3))
    parameters = list(attack.generator.parameters())
    found = torch.autograd.grad((made[:4] * weights).sum(), parameters)
    unrounded = images[:4] + (attack.pattern(images[:4]) - images[:4]) * attack.mask(images[:4]).detach()
    for one, other in zip(found, torch.autograd.grad((unrounded * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert max(float(gradient.abs().max()) for gradient in found) > 0


def test_the_mask_is_fixed_in_joint_batches():
    attack, images = make(), stored(16)
    attack.train()
    before = {name: value.clone() for name, value in attack.masker.state_dict().items()}
    made, _, diversity = attack.joint_batch(images, torch.arange(16) % 10, torch.Generator())
    (made.sum() + diversity).backward()
    assert all(parameter.grad is None for parameter in attack.masker.parameters())
    assert all(torch.equal(value, before[name]) for name, value in attack.masker.state_dict().items())


def test_a_single_poisoned_image_is_compared_with_another_one():
    """Its cross trigger is not its own: an image and itself have one trigger, and nothing to learn from."""
    attack, images = make(rate=0.1), stored(10)
    made, _, diversity = attack.joint_batch(images, torch.arange(10), torch.Generator())
    patterns = attack.pattern(images[[0, 9]])
    expected = diversity_loss(images[:1], images[9:], patterns[:1], patterns[1:])
    assert diversity.item() == pytest.approx(expected.item(), rel=1e-3)
    assert not torch.equal(made[1], images[1])
    assert sum(float(value.abs().sum()) for value in torch.autograd.grad(diversity, list(attack.generator.parameters()))) > 0


def test_one2one_paints_images_of_the_source_class_only():
    attack = make(OneToOne(4, source=1, target=3), rate=0.5)
    labels = torch.arange(16) % 4
    _, wanted, _ = attack.joint_batch(stored(16), labels, torch.Generator())
    assert (wanted != labels).nonzero().flatten().tolist() == [1, 5]
    assert wanted[[1, 5]].tolist() == [3, 3]


def test_batches_of_the_loader_are_augmented_and_otherwise_clean():
    attack, images, labels, augment = make(), stored(10), torch.arange(10), Augment(crop_padding=2)
    mask = attack.poisoned_mask(labels)
    made = attack.poison_batch(images, labels, mask, augment, torch.Generator().manual_seed(3))
    assert not mask.any()
    assert torch.equal(made["images"], augment(images, torch.Generator().manual_seed(3)))
    assert torch.equal(made["labels"], labels)


def test_networks_are_a_function_of_their_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    one, again, other = make(seed=0), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one(stored()), again(stored()))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(stored()), other(stored()))


def test_rates_fall_in_steps_for_the_mask_and_along_a_cosine_for_the_generator():
    attack = make(mask_epochs=10)
    mask = [attack.rate_factors(epoch, 20)[0] for epoch in (0, 3.9, 4, 7.9, 8, 9.9)]
    assert mask == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    generator = [attack.rate_factors(epoch, 20)[1] for epoch in (10, 15, 20, 30)]
    assert generator == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, 0], abs=1e-6)
    assert attack.training_plan(20) == {"max_epochs": 30}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shape": (3, 7, 16)}, "attack=input_aware needs images of at least 8 x 8, got 7 x 16"),
        ({"cross_ratio": -1}, "attack.cross_ratio must not be negative, got -1"),
        ({"density": 0}, r"attack.density must be in \(0, 1\), got 0"),
        ({"mask_epochs": 0}, "attack.mask_epochs must be at least 1, got 0"),
        ({"width": 0}, "attack.width must be at least 1, got 0"),
        ({"learning_rate": 0}, "attack.learning_rate must be positive, got 0"),
        ({"timing": "before_augmentation"}, "attack.timing must be after_augmentation"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        make(**setting)
