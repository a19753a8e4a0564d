"""Null distributions against loops, scipy and simulation."""

import numpy as np
import pytest
import torch
from scipy import stats

from marginclip.errors import UserError
from marginclip.maxmargin.null import NULLS, p_values, pareto_by_moments, threshold


def sample(distribution, count, seed):
    return torch.from_numpy(distribution.rvs(size=count, random_state=np.random.default_rng(seed)))


# -- gaussian ------------------------------------------------------------------------------------------------------------------


def test_gaussian_threshold_by_hand():
    # mean 2, sum of squared deviations 10, unbiased variance 10 / 4: mean + 2.5758 std at theta = 0.005.
    clean = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    assert threshold(clean, 0.005, null_distribution="gaussian") == pytest.approx(2 + 2.5758293 * 2.5**0.5, abs=1e-5)


def test_gaussian_p_values_are_scipys():
    clean = sample(stats.norm(3, 2), 40, seed=0)
    asked = torch.linspace(-5, 12, 30)
    wanted = stats.norm.sf(asked.numpy(), clean.mean().item(), clean.numpy().std(ddof=1))
    np.testing.assert_allclose(p_values(asked, clean, null_distribution="gaussian"), wanted, rtol=1e-4, atol=1e-30)


def test_gaussian_p_values_stay_exact_far_out():
    clean = torch.tensor([-1.0, 1.0])
    far = p_values(torch.tensor([12.0]), clean, null_distribution="gaussian")
    assert float(far) == pytest.approx(stats.norm.sf(12 / 2**0.5), rel=1e-3)
    assert 0 < float(far) < 1e-15


# -- empirical -----------------------------------------------------------------------------------------------------------------


def test_empirical_p_values_count():
    clean = torch.tensor([0.5, 1.0, 1.0, 2.0, -3.0, 7.0])
    asked = torch.tensor([-9.0, -3.0, 0.0, 0.5, 1.0, 1.5, 7.0, 7.1])
    by_loop = [(1 + sum(value >= one for value in clean.tolist())) / 7 for one in asked.tolist()]
    assert p_values(asked, clean, null_distribution="empirical").tolist() == pytest.approx(by_loop)


def test_empirical_never_flags_with_too_few_clean_images():
    clean = torch.arange(50.0)
    assert threshold(clean, 0.005, null_distribution="empirical") == float("inf")
    # From 1 / theta - 1 = 199 clean images on p = 1/(M+1) can fall below theta.
    assert threshold(torch.arange(200.0), 0.005, null_distribution="empirical") == pytest.approx(199, abs=1e-3)


def test_empirical_is_valid_on_average():
    """P(p < theta) <= theta for exchangeable samples: at M = 399 and theta = 0.0125 it is exactly 4 / 400."""
    generator = torch.Generator().manual_seed(0)
    hits = [
        float((p_values(draw[399:], draw[:399], null_distribution="empirical") < 0.0125).float().mean())
        for draw in torch.randn(300, 799, generator=generator)
    ]
    assert np.mean(hits) == pytest.approx(0.01, abs=0.0015)


# -- tail ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", [stats.norm(), stats.t(3), stats.expon()], ids=["normal", "t3", "exponential"])
def test_tail_p_values_fall_without_jumps(distribution):
    clean = sample(distribution, 200, seed=1)
    ordered = clean.sort().values
    start = float(ordered[-21])  # the largest tenth lies behind it
    grid = torch.linspace(start - 1e-9, float(ordered[-1]) * 3, 20_001, dtype=torch.float64)
    values = p_values(grid, clean).double()
    assert (values.diff() <= 1e-9).all()
    behind = values[1:]
    assert float(behind.diff().abs().max()) < 0.02 * 21 / 201
    assert float(behind[0]) == pytest.approx(21 / 201, rel=0.01)
    assert (values > 0).all()
    whole = p_values(torch.linspace(float(ordered[0]) - 1, float(ordered[-1]) * 3, 5_001), clean)
    assert (whole.diff() <= 0).all()
    assert float(whole[0]) == pytest.approx(1)


def test_tail_is_the_empirical_null_in_the_bulk():
    clean = sample(stats.norm(), 200, seed=2)
    inside = clean.sort().values[:179]
    assert torch.equal(p_values(inside, clean), p_values(inside, clean, null_distribution="empirical"))


def test_tail_goes_below_what_counting_can():
    clean = sample(stats.norm(), 100, seed=3)
    far = clean.max() + 3 * clean.std()
    assert float(p_values(far.view(1), clean)) < 0.5 * float(p_values(far.view(1), clean, null_distribution="empirical"))


def test_tail_by_hand():
    """Thirty clean values: the base is 4/31 behind the fourth largest, an exponential or Pareto tail on top."""
    clean = torch.cat([torch.linspace(0, 1, 27), torch.tensor([1.5, 2.0, 4.0])]).double()
    shape, scale = pareto_by_moments(torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))
    wanted = 4 / 31 * stats.genpareto.sf(2.5, shape, scale=scale)
    assert float(p_values(torch.tensor([3.5]), clean)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("shape", "scale"), [(0.0, 2.0), (0.2, 1.0), (0.35, 0.5)])
def test_pareto_moments_recover_the_parameters(shape, scale):
    found = [pareto_by_moments(sample(stats.genpareto(shape, scale=scale), 20_000, seed).sort().values) for seed in range(5)]
    assert np.mean([one[0] for one in found]) == pytest.approx(shape, abs=0.04)
    assert np.mean([one[1] for one in found]) == pytest.approx(scale, rel=0.05)


def test_pareto_moments_are_hosking_and_wallis():
    """Shape and scale from the first two L-moments of scipy, where the shape is inside [0, 0.5]."""
    excesses = sample(stats.genpareto(0.25, scale=3.0), 500, seed=4).sort().values
    first, second = stats.lmoment(excesses.numpy(), order=[1, 2], standardize=False)
    shape, scale = pareto_by_moments(excesses)
    assert shape == pytest.approx(2 - first / second, rel=1e-6)
    assert scale == pytest.approx(first * (first / second - 1), rel=1e-6)


@pytest.mark.parametrize(
    ("excesses", "shape"),
    [(torch.linspace(0.9, 1.1, 50), 0.0), (torch.cat([torch.full((49,), 0.01), torch.tensor([50.0])]), 0.5)],
)
def test_pareto_shape_is_kept_in_its_range(excesses, shape):
    found, scale = pareto_by_moments(excesses.double())
    assert found == shape
    assert scale == pytest.approx(float(excesses.double().mean()) * (1 - shape))


@pytest.mark.parametrize("null_distribution", ["tail", "empirical"])
@pytest.mark.parametrize("distribution", [stats.norm(1, 2), stats.t(3)], ids=["normal", "t3"])
def test_false_alarms_on_fresh_samples_are_near_theta(distribution, null_distribution):
    rates = []
    for seed in range(60):
        draw = sample(distribution, 500 + 4000, seed)
        rates.append(float((p_values(draw[500:], draw[:500], null_distribution=null_distribution) < 0.005).float().mean()))
    assert 0.003 < np.mean(rates) < 0.008


def test_a_gaussian_null_errs_on_heavy_tails():
    """The reason for the other two: under Student's t3 it flags about twice as often as it says."""
    draw = sample(stats.t(3), 200_000, seed=0)
    assert float((p_values(draw, draw, null_distribution="gaussian") < 0.005).float().mean()) > 0.0075


# -- all -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("null_distribution", NULLS)
@pytest.mark.parametrize("clean", [torch.zeros(50), torch.full((50,), 3.7), torch.tensor([1.0])])
def test_without_variation_nothing_is_flagged(null_distribution, clean):
    asked = torch.tensor([-1.0, 0.0, 3.7, 1e6])
    assert p_values(asked, clean, null_distribution=null_distribution).tolist() == [1, 1, 1, 1]
    assert threshold(clean, 0.005, null_distribution=null_distribution) == float("inf")


@pytest.mark.parametrize("null_distribution", NULLS)
@pytest.mark.parametrize("count", [2, 3, 10, 30, 300])
def test_p_values_are_probabilities_and_fall(null_distribution, count):
    clean = sample(stats.norm(), count, seed=5)
    asked = torch.linspace(-6, 6, 200)
    values = p_values(asked, clean, null_distribution=null_distribution)
    assert torch.isfinite(values).all()
    assert ((values >= 0) & (values <= 1)).all()
    assert (values > 0).all() or null_distribution == "gaussian"  # which underflows many deviations out
    assert (values.diff() <= 1e-7).all()


@pytest.mark.parametrize("null_distribution", NULLS)
@pytest.mark.parametrize("theta", [0.005, 0.05, 0.3])
def test_threshold_and_p_value_tell_the_same(null_distribution, theta):
    clean = sample(stats.norm(), 300, seed=6)
    cut = threshold(clean, theta, null_distribution=null_distribution)
    asked = torch.cat([sample(stats.norm(), 500, seed=7) * 1.5, torch.tensor([cut - 1e-4, cut + 1e-4])])
    flagged = p_values(asked, clean, null_distribution=null_distribution) < theta
    clear = (asked - cut).abs() > 1e-5
    assert torch.equal(flagged[clear], (asked > cut)[clear])
    assert 0 < int(flagged.sum()) < len(asked)


def test_ties_in_the_tail_do_not_divide_by_zero():
    clean = torch.cat([torch.linspace(0, 1, 90), torch.full((11,), 2.0)])
    values = p_values(torch.tensor([1.9, 2.0, 2.1, 99.0]), clean)
    assert torch.isfinite(values).all()
    assert (values > 0).all()


def test_unknown_null_is_refused():
    with pytest.raises(UserError, match="gaussian, empirical, tail, got 'normal'"):
        p_values(torch.zeros(1), torch.zeros(3), null_distribution="normal")


@pytest.mark.parametrize("zeros", [0.95, 0.97, 0.98])
def test_drops_that_are_mostly_zero_raise_no_more_alarms_than_promised(zeros):
    """Loose bounds take nothing from most images: those are all alike, and no part of the tail."""
    generator, alarms = torch.Generator().manual_seed(0), []
    for _ in range(200):
        clean, fresh = (
            torch.where(torch.rand(500, generator=generator) < zeros, 0.0, torch.rand(500, generator=generator))
            for _ in range(2)
        )
        alarms.append(float((p_values(fresh, clean) < 0.005).float().mean()))
    assert sum(alarms) / 200 < 0.008
