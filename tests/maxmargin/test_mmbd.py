"""MM-BD against SciPy's gamma, a loop over classes, simulation, and planted backdoors."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from marginclip.errors import UserError
from marginclip.maxmargin.margin import ascend_margins, margin, random_starts
from marginclip.maxmargin.mmbd import MaximumMarginTest, fit_gamma, gamma_draws, largest_p_value, maximum_margin_detection
from marginclip.networks.copies import frozen_copy
from marginclip.networks.memory import memory_limited_to

FEW = {"starts": 4, "steps": 8, "step_size": 0.05, "rule": "unit_norm", "tolerance": 0.0}
SHAPE = (3, 8, 8)


def draws(shape, count, num_classes, seed=0):
    return gamma_draws(shape, (count, num_classes), torch.Generator().manual_seed(seed))


# -- statistics of either sign --------------------------------------------------------------------------------------------------


def test_the_suspect_is_the_class_of_the_largest_statistic_where_none_is_positive():
    values = torch.tensor([-5.0, -3.0, -1.0, -4.0, -2.0])
    assert MaximumMarginTest().judge(values).suspect == 2
    assert MaximumMarginTest().judge_signed(values).suspect == 2


def test_statistics_of_either_sign_are_judged_by_their_spread():
    test = MaximumMarginTest(alpha=0.01)
    just_above = torch.tensor([-3, -2.8, -4, -3.3, 0.05, -2.9, -3.1, -3.5, -2.7, -3.2])
    found = test.judge_signed(just_above)
    far = test.judge_signed(just_above + 20 * (just_above > 0))
    assert (found.suspect, far.suspect) == (4, 4)
    assert far.detected and far.p_value < found.p_value
    moved = test.judge_signed(3 * just_above + 7)
    assert moved.p_value == found.p_value, "neither place nor scale counts"


def test_a_nominal_level_is_held_by_normal_statistics():
    generator = torch.Generator().manual_seed(1)
    test = MaximumMarginTest(alpha=0.05, simulations=2000)
    accused = [test.judge_signed(torch.randn(10, generator=generator) - 2).detected for _ in range(400)]
    assert sum(accused) / 400 == pytest.approx(0.05, abs=0.03)


# -- the null -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.4, 3.0, 60.0])
def test_gamma_fit_is_scipys(shape):
    values = 7 * draws(shape, 3, 20)
    found = fit_gamma(values)
    for row in range(3):
        expected, _, scale = stats.gamma.fit(values[row].numpy(), floc=0)
        assert float(found[0][row]) == pytest.approx(expected, rel=1e-4)
        assert float(found[1][row]) == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("exponent", ["classes", "others"])
def test_p_value_without_calibration_is_the_order_statistics(exponent):
    values = 5 * draws(8.0, 1, 10)[0]
    rest = np.delete(values.numpy(), int(values.argmax()))
    shape, _, scale = stats.gamma.fit(rest, floc=0)
    power = 10 if exponent == "classes" else 9
    expected = 1 - stats.gamma.cdf(float(values.max()), shape, scale=scale) ** power
    found = MaximumMarginTest(calibration="none", exponent=exponent).judge(values)
    assert found.p_value == pytest.approx(expected, rel=1e-3)
    assert found.p_value == found.uncalibrated_p_value


@pytest.mark.parametrize("calibration", ["none", "bootstrap"])
def test_p_value_falls_as_the_largest_grows_and_ignores_the_scale(calibration):
    values = torch.tensor([9.0, 11.0, 12.0, 8.0, 10.0, 13.0, 9.5, 10.5])
    test = MaximumMarginTest(calibration=calibration, simulations=2000)
    p_values = []
    for largest in (13.5, 15.0, 20.0, 40.0):
        values[2] = largest
        found = test.judge(values)
        assert found.suspect == 2
        assert test.judge(100 * values).p_value == pytest.approx(found.p_value, rel=1e-6)
        p_values.append(found.p_value)
    assert p_values == sorted(p_values, reverse=True)
    assert p_values[0] > 0.1 > 0.01 > p_values[-1]


def test_false_alarms_of_clean_models_are_what_alpha_promises():
    """Known from simulation: the published p-value accuses a quarter at 10 classes; the calibrated one 4 %."""
    sets = draws(8.0, 300, 10, seed=3)
    plain = (largest_p_value(draws(8.0, 5000, 10, seed=5), 10)[0] <= 0.05).double().mean()
    test = MaximumMarginTest(simulations=1000)
    calibrated = np.mean([test.judge(values).detected for values in sets])
    assert 0.23 < plain < 0.28
    assert 0.02 < calibrated < 0.09


def test_a_real_outlier_is_detected_all_the_same():
    sets = draws(8.0, 50, 10, seed=4)
    sets[:, 6] = 5 * sets.median()
    test = MaximumMarginTest(simulations=1000)
    found = [test.judge(values) for values in sets]
    assert np.mean([result.detected and result.suspect == 6 for result in found]) > 0.9


def test_classes_that_never_win_and_equal_statistics_are_judged():
    found = MaximumMarginTest(simulations=200).judge(torch.tensor([-3.0, 0.0, 10.0, 11.0, 12.0]))
    assert 0 < found.p_value <= 1
    assert found.statistics[0] == -3
    assert not MaximumMarginTest(simulations=200).judge(torch.full((5,), -1.0)).detected


# -- the statistics -----------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_a_loop_over_classes(net):
    starts = random_starts(4, SHAPE, generator=torch.Generator().manual_seed(0))
    expected = []
    for label in range(4):
        classes = torch.full((4,), label)
        found = ascend_margins(net, classes, starts, steps=8, step_size=0.05, rule="unit_norm")
        expected.append(float(margin(net(found.images), classes).detach().max()))
    found = maximum_margin_detection(net, SHAPE, 4, **FEW)
    assert found.statistics.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert found.suspect == int(np.argmax(expected))


def test_permuting_the_classes_permutes_the_statistics(net):
    order = torch.tensor([2, 0, 3, 1])
    permuted = copy.deepcopy(net)
    with torch.no_grad():
        permuted[-1].weight.copy_(net[-1].weight[order])
        permuted[-1].bias.copy_(net[-1].bias[order])
    test = MaximumMarginTest(**FEW)
    assert torch.allclose(test.statistics(permuted, SHAPE, 4), test.statistics(net, SHAPE, 4)[order], atol=1e-4)


def test_a_constant_on_all_logits_changes_nothing(net):
    shifted = copy.deepcopy(net)
    with torch.no_grad():
        shifted[-1].bias += 5
    test = MaximumMarginTest(**FEW)
    assert torch.allclose(test.statistics(shifted, SHAPE, 4), test.statistics(net, SHAPE, 4), atol=1e-4)


@pytest.mark.parametrize("label", [0, 3])
def test_a_planted_row_makes_its_class_the_suspect(net, label):
    with torch.no_grad():
        net[-1].weight[label] = 30
        net[-1].bias[label] = 0
    found = maximum_margin_detection(net, SHAPE, 4, **FEW)
    assert found.suspect == label
    assert found.detected


def test_the_model_is_left_as_it_was_and_seeds_repeat(net):
    net.train()
    before = copy.deepcopy(net.state_dict())
    one, other = (maximum_margin_detection(net, SHAPE, 4, seed=2, **FEW) for _ in range(2))
    assert torch.equal(one.statistics, other.statistics)
    assert one.p_value == other.p_value
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in net.parameters())


def test_settings_and_models_that_make_no_sense_are_refused(net):
    for setting in (
        {"calibration": "magic"},
        {"exponent": "k"},
        {"rule": "up"},
        {"alpha": 0},
        {"starts": 0},
        {"simulations": 5},
    ):
        with pytest.raises(UserError, match=f"detect.{next(iter(setting))} must be"):
            MaximumMarginTest(**setting)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(UserError, match="logits of 5 classes, not of num_classes=12"):
        maximum_margin_detection(model, SHAPE, 12, **FEW)
    with pytest.raises(UserError, match="does not take images of 1 x 8 x 8"):
        maximum_margin_detection(model, (1, 8, 8), 5, **FEW)
    with pytest.raises(UserError, match="at least 3 classes, got 2"):
        maximum_margin_detection(net, SHAPE, 2)


# -- the frozen copy ----------------------------------------------------------------------------------------------------------


def test_frozen_copy_computes_the_same_without_batch_norms(net, images):
    frozen = frozen_copy(net, images)
    assert torch.allclose(frozen(images), net(images), atol=1e-5)
    assert not [module for module in frozen.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not [value for value in frozen.parameters() if value.requires_grad]
    assert all(value.requires_grad for value in net.parameters())


def test_frozen_copy_of_what_cannot_be_traced_is_a_copy(net, images):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x):
            return self.inner(x) if x.mean() > -1 else x

    model = Branching().eval()
    frozen = frozen_copy(model, images)
    assert frozen is not model
    assert torch.equal(frozen(images), model(images))


def test_a_model_that_keeps_a_tensor_with_its_gradient_is_one_sentence():
    class Keeps(torch.nn.Linear):
        def forward(self, images):
            self.kept = super().forward(images)
            return self.kept

    model = Keeps(4, 3)
    model(torch.rand(2, 4))
    with pytest.raises(UserError, match=r"the model Keeps cannot be copied: it keeps a tensor of an earlier forward pass"):
        frozen_copy(model, torch.rand(2, 4))
    with torch.no_grad():
        model(torch.rand(2, 4))
    assert torch.equal(frozen_copy(model, torch.rand(2, 4)).weight, model.weight)


def test_classes_that_do_not_fit_at_once_are_searched_in_groups(net, monkeypatch):
    test = MaximumMarginTest(**FEW)
    wanted, images = test.search(net, SHAPE, 4)
    largest = []
    climb = ascend_margins

    def counting(network, classes, starts, **settings):
        largest.append(len(starts))
        return climb(network, classes, starts, **settings)

    monkeypatch.setattr("marginclip.maxmargin.mmbd.ascend_margins", counting)
    with memory_limited_to(2 * 6 * 4 * 3 * 64 * 4 / 2**30):  # two classes of four images, six times over
        found, reached = test.search(net, SHAPE, 4)
    assert largest == [8, 8]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(reached, images)


def test_models_in_double_precision_are_tested_too(net):
    found = MaximumMarginTest(**FEW).search(copy.deepcopy(net).double(), SHAPE, 4)[0]
    torch.testing.assert_close(found, MaximumMarginTest(**FEW).search(net, SHAPE, 4)[0], rtol=1e-2, atol=1e-2)
