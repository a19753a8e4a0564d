"""I-BAU: its hypergradient against closed forms and finite differences, its steps against plain autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.plugins import MixedPrecision

from marginclip.defenses import IBAU
from marginclip.defenses.weights.ibau import fixed_point_hypergradient
from marginclip.errors import UserError
from marginclip.silence import silent_trainer


@pytest.fixture
def quadratic():
    """inner = d'Ad/2 - d'B theta (so d* = A^-1 B theta), outer = |d - c|^2 / 2 + theta'E theta / 2, in float64."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    a = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
    b, e = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    c, theta = (
        torch.randn(4, generator=generator, dtype=torch.float64),
        torch.randn(3, generator=generator, dtype=torch.float64),
    )
    e = e.T @ e
    theta.requires_grad_()
    return a, b, c, e, theta


def hypergradient(quadratic, iterations, delta=None):
    a, b, c, e, theta = quadratic
    delta = torch.linalg.solve(a, b @ theta.detach()) if delta is None else delta
    (gradient,) = fixed_point_hypergradient(
        lambda d: d @ a @ d / 2 - d @ b @ theta,
        lambda d: (d - c).square().sum() / 2 + theta @ e @ theta / 2,
        delta, [theta], iterations=iterations, step_size=0.1,
    )  # fmt: skip
    return gradient


def test_converges_to_the_closed_form(quadratic):
    a, b, c, e, theta = quadratic
    t = theta.detach()
    star = torch.linalg.solve(a, b @ t)
    exact = e @ t + b.T @ torch.linalg.solve(a.T, star - c)
    errors = [float((hypergradient(quadratic, count) - exact).norm()) for count in (1, 5, 50, 600)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9
    # the same by finite differences of the outer loss at the inner solution
    for k in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[k] = 1e-5
        values = []
        for moved in (t + shift, t - shift):
            d = torch.linalg.solve(a, b @ moved)
            values.append(float((d - c).square().sum() / 2 + moved @ e @ moved / 2))
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(exact[k]), rel=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_is_the_truncated_neumann_series(quadratic, iterations):
    a, b, c, e, theta = quadratic
    delta = torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    turn = torch.eye(4, dtype=torch.float64) - 0.1 * a
    v = sum(torch.linalg.matrix_power(turn.T, k) @ (delta - c) for k in range(iterations))
    expected = e @ theta.detach() + 0.1 * b.T @ v
    torch.testing.assert_close(hypergradient(quadratic, iterations, delta), expected, rtol=1e-10, atol=1e-12)


def test_without_iterations_it_is_the_plain_outer_gradient(victim, clean):
    victim.requires_grad_(True)
    images, labels = clean
    delta = 0.1 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    parameters = list(victim.parameters())

    def outer(d):
        return F.cross_entropy(victim(images + d), labels)

    found = fixed_point_hypergradient(lambda d: -outer(d), outer, delta, parameters, iterations=0)
    plain = torch.autograd.grad(outer(delta), parameters)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    moved = fixed_point_hypergradient(lambda d: -outer(d), outer, delta, parameters, iterations=1)
    assert not all(torch.allclose(one, other) for one, other in zip(moved, plain, strict=True))


def slow_perturbation(network, images, defense):
    delta = torch.zeros_like(images[:1])
    for index in range(defense.steps_per_round):
        batch = images[defense._rows(index)]
        leaf = delta.clone().requires_grad_()
        loss = -F.cross_entropy(network(batch + leaf), network(batch).argmax(1)) + 0.001 * (leaf**2).sum()
        delta = delta - 10 * torch.autograd.grad(loss, leaf)[0]
    return delta * min(1, 10 / float(delta.norm()))


def test_the_perturbation_is_one_pass_of_sgd_within_the_ball(victim, clean):
    defense = IBAU(batch_size=8)
    defense.prepare(victim, *clean)
    defense._find_perturbation()
    torch.testing.assert_close(defense.delta, slow_perturbation(victim, clean[0], defense), atol=1e-5, rtol=1e-4)
    assert float(defense.delta.norm()) <= 10.0001
    small = IBAU(batch_size=8, radius=0.5)
    small.prepare(victim, *clean)
    small._find_perturbation()
    assert float(small.delta.norm()) == pytest.approx(0.5, rel=1e-4)


def test_without_iterations_it_is_adam_on_the_perturbed_batches(victim, clean, fit):
    """Known errors 11 and 17: another rate, batch-norm mode, ball or label would be another network."""
    defense = IBAU(rounds=2, batch_size=12, iterations=0, share=0.25)
    victim, images, labels = victim.double(), clean[0].double(), clean[1]  # Adam's first steps turn rounding into whole steps
    repaired = fit(defense, victim, (images, labels), precision="64-true")
    network = copy.deepcopy(victim).eval()
    optimizer = torch.optim.Adam(network.parameters(), 3e-4)
    for epoch in range(2):
        delta = slow_perturbation(network, images, defense)
        for index in range(2):
            rows, carriers = defense._rows(index), defense._carriers(epoch, index)
            assert float(carriers.sum()) == 3
            optimizer.zero_grad()
            F.cross_entropy(network(images[rows] + carriers * delta), labels[rows]).backward()
            optimizer.step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(repaired.state_dict()[name], value, atol=1e-8, rtol=1e-6)


def test_batch_norm_statistics_stay_and_weights_move(victim, clean, fit):
    victim.train()
    repaired = fit(IBAU(rounds=2, batch_size=8), victim, clean)
    for name, value in victim.named_buffers():
        assert torch.equal(dict(repaired.named_buffers())[name], value)
    assert not torch.equal(repaired[0].weight, victim[0].weight)
    assert not torch.equal(repaired[1].weight, victim[1].weight)


def test_mixed_precision_changes_nothing(victim, clean, fit):
    one, other = (fit(IBAU(rounds=1, batch_size=8), victim, clean, precision=name) for name in ("32-true", "bf16-mixed"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_fp16_with_its_scaled_gradients_changes_nothing(victim, clean, fit):
    fp16 = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))

    def make_trainer(epochs):
        return silent_trainer(epochs, accelerator="cpu", plugins=[LightningEnvironment(), fp16])

    defense = IBAU(rounds=1, batch_size=8)
    half = defense.fit(victim, *clean, make_trainer=make_trainer).network
    assert defense.trainer.global_step == 3  # of 24 images: what a checkpoint counts
    whole = fit(IBAU(rounds=1, batch_size=8), victim, clean, precision="32-true")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(half.state_dict()[name], value, atol=1e-7, rtol=1e-6)


def test_interrupted_is_the_uninterrupted(victim, clean, fit, interrupted_and_resumed):
    def make():
        return IBAU(rounds=3, batch_size=12)

    straight = fit(through := make(), victim, clean)
    resumed, again = interrupted_and_resumed(make, victim, clean, at=3)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    assert again.history == through.history


def test_what_is_found_is_kept(victim, clean, fit):
    fit(defense := IBAU(rounds=1, batch_size=8), victim, clean)
    assert defense.arrays()["ibau/perturbation"].shape == (1, 8, 8)
    assert defense.findings()["perturbation_norm"] == pytest.approx(float(defense.delta.norm()))
    assert len(defense.history) == 1


@pytest.mark.parametrize(
    "settings", [{"rounds": 0}, {"share": 0.0}, {"radius": -1.0}, {"iterations": -1}, {"learning_rate": 0.0}, {"penalty": -1.0}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=f"defense.{next(iter(settings))} must"):
        IBAU(**settings)
