"""Attention distillation: the maps, the taps, teacher and student, each against a loop or a closed form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.defenses import NAD, FineTune
from marginclip.defenses.weights.nad import TappedNetwork, attention_distance, attention_map, attention_taps
from marginclip.errors import UserError
from marginclip.models import ResNet
from marginclip.networks.tracing import trace

SHORT = {
    "teacher_epochs": 2,
    "epochs": 2,
    "batch_size": 12,
    "teacher_learning_rate": 0.01,
    "learning_rate": 0.05,
    "high_epochs": 1,
}


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 4, 4, generator=generator), torch.randn(3, 5, 4, 4, generator=generator)


def slow_map(features):
    """The map of one image, pixel by pixel."""
    energy = [sum(float(value) ** 2 for value in features[:, row, column]) for row in range(4) for column in range(4)]
    length = sum(value**2 for value in energy) ** 0.5
    return [value / (length + 1e-6) for value in energy]


def test_map_is_the_sum_of_squares_over_channels_at_unit_length(maps):
    for image, row in zip(maps[0], attention_map(maps[0]), strict=True):
        assert row.tolist() == pytest.approx(slow_map(image), rel=1e-5)
    torch.testing.assert_close(attention_map(maps[0]).norm(dim=1), torch.ones(3))


def test_map_knows_neither_channel_order_nor_scale(maps):
    torch.testing.assert_close(attention_map(maps[0][:, [3, 1, 4, 0, 2]]), attention_map(maps[0]))
    scales = torch.tensor([0.1, 1.0, 20.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(attention_map(maps[0] * scales), attention_map(maps[0]))


def test_distance_is_zero_for_equal_features_and_finite_for_dead_ones(maps):
    assert float(attention_distance(maps[0], maps[0])) == 0
    dead = torch.zeros(3, 5, 4, 4, requires_grad=True)
    attention_distance(dead, maps[0]).backward()
    assert torch.isfinite(dead.grad).all()
    by_hand = [(a - b) ** 2 for x, y in zip(*maps, strict=True) for a, b in zip(slow_map(x), slow_map(y), strict=True)]
    assert float(attention_distance(*maps)) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


@pytest.mark.parametrize(("blocks", "stages"), [((2, 2, 2, 2), [2, 3, 4]), ((1, 1, 1), [1, 2, 3])])
def test_taps_of_a_resnet_are_the_outputs_of_its_last_three_stages(blocks, stages):
    torch.manual_seed(0)
    model = ResNet(4, 1, blocks=blocks, width=4).eval()
    images, seen = torch.rand(2, 1, 16, 16), {}
    defense = NAD()
    defense.prepare(model, images, torch.tensor([0, 1]))
    for number in stages:
        getattr(defense.network, f"layer{number}").register_forward_hook(
            lambda _, inputs, output, number=number: seen.update({number: output})
        )
    plain = defense.network.eval()(images)
    wanted = [seen[number] for number in stages]
    logits, found = defense.tapped[0](images)
    assert torch.equal(logits, plain)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


class Functional(nn.Module):
    """Functional activations, one module called at two resolutions, and a constant in its forward method."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, stride=2),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, images):
        x = self.act(self.one(images - torch.tensor([0.5])))
        x = F.relu(self.three(self.act(self.two(x))))
        return self.head(x.mean((2, 3)))


def test_taps_are_found_whatever_way_activations_are_called(clean, fit):
    torch.manual_seed(0)
    model = Functional().eval()
    traced = trace(model)
    assert attention_taps(traced, clean[0][:1]) == ["act", "relu"]
    logits, (first, last) = TappedNetwork(model, traced, ["act", "relu"])(clean[0])
    assert torch.equal(logits, model(clean[0]))
    torch.testing.assert_close(first, model.one(clean[0] - 0.5).relu())
    assert last.shape == (24, 4, 3, 3)
    repaired = fit(NAD(**SHORT), model, clean)
    assert isinstance(repaired, Functional)


def test_without_betas_the_student_is_fine_tuned(victim, clean, fit):
    defense = NAD(betas=[0, 0], **SHORT)
    student = fit(defense, victim, clean)

    class Later(FineTune):
        """Fine-tuning with the student's draws and rates."""

        def _draw(self, epoch, index):
            return super()._draw(epoch + 2, index)

        def rate(self, epoch):
            return (0.05, 0.005)[epoch]

    alone = Later(epochs=2, batch_size=12, nesterov=True, weight_decay=1e-4)
    wanted = fit(alone, victim, clean)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value)


def test_teacher_is_fine_tuned_and_then_left_alone(victim, clean, fit):
    """It stays as it is in the student's phase: weights, velocity and weight decay, batch-norm statistics (evaluation mode)."""
    longer, shorter = NAD(**SHORT), NAD(**(SHORT | {"epochs": 1}))
    fit(longer, victim, clean)
    fit(shorter, victim, clean)
    one, other = (defense.variants()["nad_teacher"].network.state_dict() for defense in (longer, shorter))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    wanted = fit(FineTune(epochs=2, batch_size=12, learning_rate=0.01, nesterov=True, weight_decay=1e-4), victim, clean)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(one[name], value)


def test_student_starts_from_the_attacked_model(victim, clean, fit):
    """Known error: a student that continues from the teacher, or statistics that move while the teacher learns."""
    watched = []

    class Watching(NAD):
        def before_epoch(self, epoch):
            super().before_epoch(epoch)
            watched.append((self.teacher.training, self.network.training))
            if epoch == self.teacher_epochs:
                for name, value in victim.state_dict().items():
                    assert torch.equal(self.network.state_dict()[name], value)

    fit(Watching(**SHORT), victim, clean)
    assert watched == [(True, False)] * 2 + [(False, True)] * 2


def test_loss_of_the_student_is_that_of_the_formula(victim, clean):
    defense = NAD(betas=[30.0, 7.0], beta_pixels=None, teacher_epochs=1)
    defense.prepare(victim, *clean)
    with torch.no_grad():
        defense.teacher[0].weight.mul_(-1)
        defense.trainer = type("At", (), {"current_epoch": 5})()
        found = defense.loss(*clean)
        first = [network[:3](clean[0]) for network in (victim, defense.teacher)]
        second = [network[:6](clean[0]) for network in (victim, defense.teacher)]
        wanted = F.cross_entropy(victim(clean[0]), clean[1]) + 30 * attention_distance(*first) + 7 * attention_distance(*second)
    torch.testing.assert_close(found, wanted)


def test_betas_weigh_the_sum_over_pixels_as_in_the_published_network(maps):
    """With as many pixels as published, betas are as they are; a quarter of the pixels have a quarter of the weight."""
    features = [torch.zeros(1, 2, *size) for size in ((4, 4), (2, 2))]
    assert NAD(betas=[8.0, 3.0], beta_pixels=[9, 16, 16])._weights(features) == [8.0, 0.75]
    sums = [float((attention_map(one) - attention_map(other)).square().sum(1).mean()) for one, other in [maps]]
    (weight,) = NAD(betas=[8.0], beta_pixels=[64])._weights([maps[0]])
    assert weight * float(attention_distance(*maps)) == pytest.approx(8 * sums[0] / 64, rel=1e-5)


def test_rates_follow_the_two_schedules():
    published = [NAD().rate(epoch) for epoch in range(10)]
    assert [round(rate, 8) for rate in published] == [0.1] * 2 + [0.01] * 8
    defense = NAD(learning_rate=0.1, high_epochs=2, teacher_decays=9)
    assert [round(defense.rate(epoch), 8) for epoch in range(10)] == [0.1] * 2 + [0.01] * 2 + [1e-3] * 2 + [1e-4] * 2 + [
        1e-5
    ] * 2
    assert [round(defense.rate(10 + epoch), 8) for epoch in range(20)] == [0.1] * 2 + [0.01] * 18
    assert defense.num_epochs == 30
    assert {NAD().rate(10 + epoch) for epoch in range(20)} == {0.01}


@pytest.mark.parametrize("at", [3, 5, 7])  # of 2 + 2 epochs of 2 steps: in the teacher's, and in both of the student's
def test_interrupted_is_bit_for_bit_the_uninterrupted(victim, clean, at, fit, interrupted_and_resumed):
    def make():
        return NAD(**SHORT, seed=1)

    straight = fit(make(), victim, clean)
    resumed, _ = interrupted_and_resumed(make, victim, clean, at=at)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())


def test_model_without_feature_maps_is_refused(clean):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with pytest.raises(UserError, match="needs activations with feature maps"):
        NAD().prepare(model, *clean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": []}, "defense.betas"),
        ({"betas": [-1.0]}, "defense.betas"),
        ({"beta_pixels": [64]}, "defense.beta_pixels"),
        ({"teacher_decays": -1}, "defense.teacher_decays"),
        ({"teacher_epochs": 0}, "defense.teacher_epochs"),
        ({"teacher_learning_rate": 0.0}, "defense.teacher_learning_rate"),
        ({"teacher_decay_every": 0}, "defense.teacher_decay_every"),
        ({"high_epochs": -1}, "defense.high_epochs"),
        ({"epochs": 0}, "defense.epochs"),
    ],
)
def test_settings_that_make_no_sense_name_their_key(settings, message):
    with pytest.raises(UserError, match=message):
        NAD(**settings)
