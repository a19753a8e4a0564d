"""GCL: ranks, clouded logits and loss by loops; what the noise may and may not do; safe on classes of equal size."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.errors import UserError
from marginclip.losses import GCL, SecondStage, gcl_logits, mixup, tail_ranks
from marginclip.losses.gcl import cloud_noise, focal_cross_entropy

COUNTS = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(8, num_classes))


def batch(count=6, num_classes=10):
    return torch.rand(count, 2, 2, 2, generator=seeded(4)), torch.arange(count) % num_classes


def test_ranks_by_the_formula():
    ranks = tail_ranks(COUNTS)
    wanted = [(math.log(5000) - math.log(count)) / (math.log(5000) - math.log(50)) for count in COUNTS.tolist()]
    assert ranks.tolist() == pytest.approx(wanted, abs=1e-6)
    assert (ranks[0], ranks[-1]) == (0, 1)
    assert ranks.diff().min() > 0


@pytest.mark.parametrize("counts", [[7, 7, 7], [1, 1]])
def test_classes_of_equal_size_have_no_tail(counts):
    assert tail_ranks(torch.tensor(counts)).tolist() == [0] * len(counts)


def test_logits_by_loops_over_images_and_classes():
    generator = seeded()
    cosines, noise = torch.rand(6, 10, generator=generator) * 2 - 1, cloud_noise((6, 10), generator)
    labels, ranks = torch.tensor([0, 3, 9, 9, 1, 5]), tail_ranks(COUNTS)
    found = gcl_logits(20 * cosines, labels, ranks, noise, scale=20, noise_mul=0.5, margin=0.1)
    for image in range(6):
        for label in range(10):
            value = cosines[image, label] - 0.5 * noise[image, label] * ranks[label] - 0.1 * (label == labels[image])
            assert found[image, label].item() == pytest.approx(20 * float(value), abs=1e-4)


def test_noise_is_drawn_for_every_image_and_class_and_only_lowers():
    noise = cloud_noise((4000, 10), seeded())
    assert len(noise.unique()) > 0.9 * noise.numel()
    assert noise.min() >= 0
    assert noise.max() == 1  # clamped, in 0.3 % of draws
    assert noise.mean().item() == pytest.approx(0.2656, rel=0.01)
    logits, labels = torch.zeros(4000, 10), torch.zeros(4000, dtype=torch.long)
    pushed = gcl_logits(logits, labels, tail_ranks(COUNTS), noise, scale=1.0, noise_mul=0.5, margin=0.0)
    assert pushed.max() <= 0
    assert (pushed[:, 0] == 0).all()  # the largest class is left alone
    assert -pushed[:, 9].mean().item() == pytest.approx(0.1328, rel=0.02)
    assert (pushed.mean(0).diff() < 0).all()


def test_the_focal_factor_is_a_constant():
    logits, labels = torch.randn(5, 3, generator=seeded(), requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(focal_cross_entropy(logits, labels, focal=0.0), F.cross_entropy(logits, labels))
    loss = focal_cross_entropy(logits, labels, focal=2.0)
    chances = logits.softmax(1).detach()[torch.arange(5), labels]
    torch.testing.assert_close(loss, ((1 - chances) ** 2 * -chances.log()).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    wanted = (1 - chances).square().unsqueeze(1) * (logits.softmax(1).detach() - F.one_hot(labels, 3)) / 5
    torch.testing.assert_close(gradient, wanted)


def test_the_loss_by_hand_with_mixup_and_a_cloud_for_each_label():
    loss = GCL(scale=20, noise_mul=0.5, margin=0.1, focal=1.0, mixup_alpha=1.0)
    model, (images, labels) = loss.adapt(linear(), COUNTS), batch()
    generator = seeded(2)
    mixed, others, share = mixup(images, labels, alpha=1.0, generator=generator)
    logits, wanted = model(mixed), 0
    for part, of in ((share, labels), (1 - share, others)):
        noise = (torch.randn(6, 10, generator=generator) / 3).clamp(-1, 1).abs()
        clouded = logits - 20 * (0.5 * noise * tail_ranks(COUNTS) + 0.1 * F.one_hot(of, 10))
        chances = clouded.softmax(1)[torch.arange(6), of]
        wanted = wanted + part * ((1 - chances) * -chances.log()).mean()
    torch.testing.assert_close(loss(model, images, labels, seeded(2)), wanted)


def test_on_classes_of_equal_size_it_is_the_cross_entropy_with_a_margin():
    loss = GCL(scale=10, margin=0.2, mixup_alpha=0)
    model, (images, labels) = loss.adapt(linear(), torch.full((10,), 30)), batch()
    found = loss(model, images, labels, seeded())
    cosines = model(images) / 10
    assert torch.isfinite(found)
    torch.testing.assert_close(found, F.cross_entropy(10 * cosines - 10 * 0.2 * F.one_hot(labels, 10), labels))


def test_draws_follow_from_the_generator_alone_and_outside_of_training_there_are_none():
    loss = GCL(mixup_alpha=0)
    model, (images, labels) = loss.adapt(linear(), COUNTS), batch()
    state = torch.get_rng_state()
    values = [loss(model, images, labels, seeded(seed)) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(images), model(images))


def test_the_loss_falls_where_rare_classes_win_more_clearly():
    loss = GCL(mixup_alpha=0)
    loss.adapt(linear(2), torch.tensor([100, 1]))
    labels = torch.ones(64, dtype=torch.long)
    values = [float(loss.of_logits(torch.tensor([[0.0, gap]]).repeat(64, 1), labels, seeded())) for gap in (0, 2, 5, 10)]
    assert values == sorted(values, reverse=True)
    assert values[0] > math.log(2)  # the cloud costs the rare class


def test_alone_it_has_no_second_stage_and_is_adapted_still():
    second = SecondStage(loss=GCL(scale=20))
    loss = GCL(second_stage=second)
    model, (images, labels) = loss.adapt(linear(), COUNTS), batch()
    alone = loss.alone()
    assert (alone.second_stage, loss.second_stage) == (None, second)
    assert torch.equal(alone(model, images, labels, seeded()), loss(model, images, labels, seeded()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "loss=gcl: scale must be positive, got 0"),
        ({"noise_mul": -0.5}, "loss=gcl: noise_mul must be a number from 0 up, got -0.5"),
        ({"margin": -1.0}, "loss=gcl: margin must be a number from 0 up, got -1"),
        ({"focal": float("nan")}, "loss=gcl: focal must be a number from 0 up, got nan"),
        ({"mixup_alpha": -1.0}, "loss=gcl: mixup_alpha must be a number from 0 up, got -1"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings, message):
    with pytest.raises(UserError) as caught:
        GCL(**settings)
    assert str(caught.value) == message


def test_a_class_without_images_is_refused():
    with pytest.raises(UserError, match="loss=gcl needs a training image of every class"):
        GCL().adapt(linear(3), torch.tensor([5, 0, 2]))


# -- the second stage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "first", "wanted"), [(0.15, 200, 30), (0.15, 1000, 150), (0.15, 1, 1), (30, 200, 30), (1, 9, 1)]
)
def test_epochs_of_the_second_stage(epochs, first, wanted):
    assert SecondStage(loss=GCL(), epochs=epochs).num_epochs(first) == wanted


@pytest.mark.parametrize("epochs", [0, -1, 1.5, float("nan"), float("inf")])
def test_epochs_are_a_share_or_whole(epochs):
    with pytest.raises(UserError, match=r"loss\.second_stage\.epochs must be a whole number from 1 up, or a share"):
        SecondStage(loss=GCL(), epochs=epochs)


def test_other_mistakes_of_the_second_stage():
    with pytest.raises(UserError, match=r"loss\.second_stage\.learning_rate must be positive, got 0"):
        SecondStage(loss=GCL(), learning_rate=0)
    with pytest.raises(UserError, match="there are two stages at most"):
        SecondStage(loss=GCL(second_stage=SecondStage(loss=GCL())))
