"""Scales and shifts of logits: the fit against SciPy, a closed form and every smaller family, and where there is none."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from torch import nn

from marginclip.defenses.posthoc import affine_logits
from marginclip.defenses.posthoc.affine_logits import AffineLogits, fit_affine
from marginclip.errors import UserError

FAMILIES = list(itertools.product(("none", "shared", "per_class"), (False, True)))[1:]


@pytest.fixture
def skewed():
    """Logits (300, 5) of a model that is overconfident and prefers the first classes, and their labels."""
    random = np.random.default_rng(0)
    labels = np.arange(300) % 5
    logits = 3 * random.normal(size=(300, 5)) + np.linspace(6, 0, 5)
    logits[np.arange(300), labels] += 4
    return torch.tensor(logits).float(), torch.tensor(labels)


def slow_nll(logits, labels, scale, shift):
    """The mean cross entropy, image by image."""
    total = 0.0
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        values = row * np.asarray(scale) + np.asarray(shift)
        total += math.log(sum(math.exp(value - values.max()) for value in values)) + values.max() - values[label]
    return total / len(labels)


def nll(logits, labels, fitted):
    return slow_nll(logits, labels, fitted[0].numpy(), fitted[1].numpy())


def fast_nll(logits, labels, scale, shift):
    values = logits.double().numpy() * scale + shift
    top = values.max(1)
    return np.mean(np.log(np.exp(values - top[:, None]).sum(1)) + top - values[np.arange(len(values)), labels.numpy()])


def scipy_best(logits, labels, scale, shift, l2):
    """The same minimum by SciPy's BFGS with numerical gradients, from another start."""
    size = {"none": 0, "shared": 1, "per_class": 5}[scale]

    def parts(x):
        return (x[:size] if size else np.ones(1)), (x[size:] if shift else np.zeros(5))

    def objective(x):
        scales, shifts = parts(x)
        pull = (np.sum((scales - 1) ** 2) if size else 0) + np.sum(shifts**2)
        return fast_nll(logits, labels, scales, shifts) + l2 / 2 * pull

    start = np.concatenate([np.full(size, 0.5), np.full(5 if shift else 0, 0.3)])
    return parts(minimize(objective, start, method="BFGS", options={"gtol": 1e-7}).x)


@pytest.mark.parametrize(("scale", "shift"), FAMILIES)
@pytest.mark.parametrize("l2", [1e-2, 1e-6])
def test_fit_is_scipys_minimum(skewed, scale, shift, l2):
    found = fit_affine(*skewed, scale=scale, shift=shift, l2=l2)
    wanted = scipy_best(*skewed, scale, shift, l2)
    assert fast_nll(*skewed, found[0].numpy(), found[1].numpy()) == pytest.approx(slow_nll(*skewed, *wanted), abs=1e-6)
    if l2 == 1e-2:  # at 1e-6 a common shift of all classes costs next to nothing, and numerical gradients do not see it
        assert found[0].numpy() == pytest.approx(wanted[0], abs=1e-3)
        assert found[1].numpy() == pytest.approx(wanted[1], abs=1e-3)


def test_temperature_is_that_of_a_search_over_one_number(skewed):
    scale, shift = fit_affine(*skewed, scale="shared", shift=False, l2=0.0)
    wanted = minimize_scalar(lambda t: slow_nll(*skewed, 1 / t, 0.0), bounds=(0.2, 10), method="bounded").x
    assert 1 / float(scale) == pytest.approx(wanted, rel=1e-4)
    assert wanted > 1.2, "choose logits that are overconfident"
    assert torch.equal(shift, torch.zeros(5))


def test_shifts_of_constant_logits_give_the_label_frequencies():
    """Closed form: softmax(logits + shift) is the frequencies, and without a pull elsewhere the shifts sum to zero."""
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    logits = torch.tensor([1.0, -2.0, 0.5]).expand(10, 3)
    _, shift = fit_affine(logits, labels, scale="none", shift=True, l2=0.0)
    wanted = torch.tensor([0.6, 0.3, 0.1]).log() - logits[0]
    torch.testing.assert_close(shift.float(), wanted - wanted.mean(), atol=1e-5, rtol=0)


def test_more_parameters_fit_no_worse_and_gain_something_here(skewed):
    best = {case: nll(*skewed, fit_affine(*skewed, scale=case[0], shift=case[1], l2=0.0)) for case in FAMILIES}
    identity = slow_nll(*skewed, 1.0, 0.0)
    chains = [
        [identity, best["none", True], best["shared", True], best["per_class", True]],
        [identity, best["shared", False], best["shared", True]],
        [identity, best["shared", False], best["per_class", False], best["per_class", True]],
    ]
    for chain in chains:
        assert all(more < less for less, more in itertools.pairwise(chain))


def test_no_step_in_any_direction_is_better(skewed):
    scale, shift = fit_affine(*skewed, scale="per_class", shift=True, l2=0.0)
    best = fast_nll(*skewed, scale.numpy(), shift.numpy())
    random = np.random.default_rng(1)
    for size in (1e-3, 0.1, 2.0):
        for _ in range(20):
            step = size * random.normal(size=(2, 5))
            assert fast_nll(*skewed, scale.numpy() + step[0], shift.numpy() + step[1]) >= best - 1e-12


def test_a_strong_pull_stays_at_the_identity(skewed):
    scale, shift = fit_affine(*skewed, scale="per_class", shift=True, l2=1e6)
    assert scale.tolist() == pytest.approx([1.0] * 5, abs=1e-4)
    assert shift.tolist() == pytest.approx([0.0] * 5, abs=1e-4)


def test_where_all_is_right_already_the_pull_decides():
    logits, labels = 4 * torch.eye(3).repeat(5, 1), torch.arange(3).repeat(5)
    scale, _ = fit_affine(logits, labels, scale="shared", shift=False, l2=1e-6)
    assert 1 < float(scale) < 5
    assert float(fit_affine(logits, labels, scale="shared", shift=False, l2=1e-3)[0]) < float(scale)


def test_the_shift_of_a_class_without_images_is_refused():
    """It would switch the class off. Scales alone can be fitted all the same."""
    logits, labels = torch.eye(4, 3) + torch.tensor([0.1, 0.2, 0.0]), torch.tensor([0, 1, 0, 1])
    with pytest.raises(UserError, match=r"^class 2 has no clean image: its offset cannot be learned$"):
        fit_affine(logits, labels, scale="none", shift=True, l2=1e-6)
    scale, _ = fit_affine(logits, labels, scale="shared", shift=False, l2=1e-2)
    assert torch.isfinite(scale).all()


def test_a_fit_that_ends_early_is_said(skewed, monkeypatch):
    monkeypatch.setattr(affine_logits, "MAX_ITERATIONS", 2)
    monkeypatch.setattr(affine_logits, "MAX_STARTS", 1)
    with pytest.raises(UserError, match=r"did not converge on the clean set \(gradient 0\..*\); be patient$"):
        fit_affine(*skewed, scale="per_class", shift=True, l2=0.01, advice="be patient")


def test_the_same_fit_again_and_no_random_number(skewed):
    state = torch.get_rng_state()
    one, other = (fit_affine(*skewed, scale="per_class", shift=True, l2=1e-6) for _ in range(2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_network_is_scaled_and_shifted(victim, clean):
    scale, shift = torch.tensor([0.5, 1.0, 2.0, -1.0]), torch.tensor([0.0, 3.0, -1.0, 0.5])
    network = AffineLogits(victim, scale=scale, shift=shift)
    with torch.no_grad():
        wanted = [
            [float(f) * float(a) + float(b) for f, a, b in zip(row, scale, shift, strict=True)] for row in victim(clean[0])
        ]
        torch.testing.assert_close(network(clean[0]), torch.tensor(wanted))
    again = AffineLogits(nn.Sequential(*victim), scale=torch.ones(4), shift=torch.zeros(4))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(clean[0]), network(clean[0]))
    assert len(list(network.parameters())) == len(list(victim.parameters()))


def test_a_search_that_rests_too_early_begins_anew(skewed, monkeypatch):
    wanted = fit_affine(*skewed, scale="per_class", shift=True, l2=0.01)
    monkeypatch.setattr(affine_logits, "MAX_ITERATIONS", 8)
    monkeypatch.setattr(affine_logits, "MAX_STARTS", 200)
    found = fit_affine(*skewed, scale="per_class", shift=True, l2=0.01)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
