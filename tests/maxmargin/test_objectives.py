"""The scalar objective against loops in plain Python, and what its terms must not do."""

import math

import pytest
import torch

from marginclip.clipping import BoundedNetwork
from marginclip.errors import UserError
from marginclip.maxmargin.margin import margin
from marginclip.maxmargin.objectives import Measured, MMACObjective, kl_divergence, margin_hinge, mmac

CLASSES = torch.arange(12) % 4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_terms_equal_loops(reduction):
    bounded, clean, margins = torch.randn(6, 4), torch.randn(6, 4), torch.randn(9)
    squares = [(bounded[i, k] - clean[i, k]).item() ** 2 for i in range(6) for k in range(4)]
    margin_term = sum(margins.tolist()) / (9 if reduction == "mean" else 1)
    objective = mmac(bounded, clean, margins, 0.3, reduction=reduction)
    assert objective.data.item() == pytest.approx(sum(squares) / 24, rel=1e-5)
    assert objective.margin.item() == pytest.approx(margin_term, rel=1e-5, abs=1e-6)
    assert objective.loss.item() == pytest.approx(sum(squares) / 24 + 0.3 * margin_term, rel=1e-5)


def test_sum_equals_mean_with_a_penalty_n_times_larger():
    bounded, clean, margins = torch.randn(6, 4), torch.randn(6, 4), torch.randn(200)
    scripts = mmac(bounded, clean, margins, 0.002, reduction="sum")
    papers = mmac(bounded, clean, margins, 0.4, reduction="mean")
    torch.testing.assert_close(scripts.loss, papers.loss)


def test_above_the_clean_maxima_the_data_term_is_zero_and_bounds_stand_still(net, images):
    bounded = BoundedNetwork(net, images[0])
    bounded.set_from_images(images)
    objective = mmac(bounded(images), net(images).detach(), margin(bounded(images), CLASSES), 0.25)
    assert objective.data == 0
    assert objective.loss == 0.25 * objective.margin
    mmac(bounded(images), net(images).detach(), margin(bounded(images), CLASSES), 0.0).loss.backward()
    assert all(value.grad.eq(0).all() for value in bounded.bound_parameters())


def test_a_small_step_on_the_margin_term_lowers_the_mean_margin(net, images):
    bounded = BoundedNetwork(net, images[0])
    bounded.set_from_images(images, share=0.7)
    before = margin(bounded(images), CLASSES).mean()
    still = torch.zeros(1, 4)
    mmac(still, still, margin(bounded(images), CLASSES), 1.0).loss.backward()
    with torch.no_grad():
        for value in bounded.bound_parameters():
            value -= 0.01 * value.grad
    assert margin(bounded(images), CLASSES).mean() < before


def test_low_precision_logits_are_reduced_in_full():
    logits = torch.randn(6, 4).bfloat16()
    assert mmac(logits, logits, torch.randn(9).bfloat16(), 0.1).loss.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_hinge_counts_what_is_won_or_nearly(reduction):
    margins = torch.tensor([-7.0, -1.5, -0.5, 0.0, 2.0], requires_grad=True)
    found = margin_hinge(margins, 1.0, reduction=reduction)
    assert found.item() == pytest.approx(4.5 / (5 if reduction == "mean" else 1))
    found.backward()
    assert margins.grad.ne(0).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("largest", "counted"), [(1, [2.0]), (2, [2.0, 0.0]), (4, [2.0, 0.0, -0.5, -1.5]), (9, None), (None, None)]
)
def test_of_the_hinge_only_the_largest_margins_count(largest, counted):
    margins = torch.tensor([-7.0, 2.0, -0.5, 0.0, -1.5], requires_grad=True)
    found = margin_hinge(margins, 1.0, largest=largest)
    chosen = margins.tolist() if counted is None else counted
    assert found.item() == pytest.approx(sum(max(0.0, value + 1.0) for value in chosen) / len(chosen))
    found.backward()
    assert int(margins.grad.ne(0).sum()) == sum(value > -1 for value in chosen)


def test_one_attacked_class_weighs_the_same_among_ten_and_among_a_hundred_classes():
    few, many = torch.full((50,), -5.0), torch.full((500,), -5.0)
    few[:5], many[:5] = 9.0, 9.0
    assert MMACObjective().largest == 10
    terms = [
        MMACObjective()(Measured(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1).long(), each, []), 1.0).margin
        for each in (few, many)
    ]
    assert terms[0] == terms[1] == 5.0
    whole = MMACObjective(largest=None)
    assert whole(Measured(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1).long(), many, []), 1.0).margin == pytest.approx(
        0.1
    )


def test_the_objectives_terms_are_chosen_one_by_one():
    measured = Measured(torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4, torch.randn(9), [])
    bounded, clean, labels, margins = measured.bounded_logits, measured.clean_logits, measured.labels, measured.margins
    paper = MMACObjective(data="squared_error", penalty="signed")(measured, 0.3)
    torch.testing.assert_close(paper.loss, mmac(bounded, clean, margins, 0.3).loss)
    ours = MMACObjective(kappa=0.5)(measured, 0.3)
    entropy = sum(-bounded[i].log_softmax(0)[labels[i]].item() for i in range(6)) / 6
    excess = sum(max(0.0, value + 0.5) for value in margins.tolist()) / 9
    assert ours.data.item() == pytest.approx(entropy, rel=1e-5)
    assert ours.margin.item() == pytest.approx(excess, rel=1e-5)
    assert ours.loss.item() == pytest.approx(entropy + 0.3 * excess, rel=1e-5)


def test_the_divergence_compares_probabilities_of_both_networks():
    measured = Measured(torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4, torch.randn(9), [])
    bounded, clean = measured.bounded_logits.double().softmax(1), measured.clean_logits.double().softmax(1)
    expected = sum(clean[i, k].item() * math.log(clean[i, k].item() / bounded[i, k].item()) for i in range(6) for k in range(4))
    assert MMACObjective(data="kl_divergence")(measured, 0.3).data.item() == pytest.approx(expected / 6, rel=1e-4)


def test_distillation_is_the_mean_of_labels_and_of_the_models_probabilities():
    measured = Measured(torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4, torch.randn(9), [])
    bounded, clean = measured.bounded_logits.double().log_softmax(1), measured.clean_logits.double().softmax(1)
    hard = sum(-bounded[i, measured.labels[i]].item() for i in range(6)) / 6
    soft = sum(-clean[i, k].item() * bounded[i, k].item() for i in range(6) for k in range(4)) / 6
    assert MMACObjective(data="distillation")(measured, 0.3).data.item() == pytest.approx((hard + soft) / 2, rel=1e-4)


def test_the_divergence_rests_where_nothing_changed_and_ignores_the_size_of_logits():
    logits = 30 * torch.randn(8, 5)
    same = logits.clone().requires_grad_(True)
    kl_divergence(same, logits).backward()
    assert same.grad.abs().max() < 1e-6
    assert kl_divergence(logits + 7.0, logits).item() == pytest.approx(0.0, abs=1e-5)
    sure = torch.tensor([[40.0, 0.0]])
    assert kl_divergence(sure / 2, sure).item() < 1e-6 < torch.nn.functional.mse_loss(sure / 2, sure).item()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"data": "l2"},
            "defense.objective.data must be one of cross_entropy, distillation, kl_divergence, squared_error, got 'l2'",
        ),
        ({"penalty": "max"}, "defense.objective.penalty must be one of hinge, signed, got 'max'"),
        ({"largest": 0}, "defense.objective.largest must be at least 1 or null, got 0"),
        ({"kappa": float("nan")}, "defense.objective.kappa must be a finite number of logits, got nan"),
    ],
)
def test_unknown_terms_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        MMACObjective(**setting)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(UserError, match="'mean' or 'sum', got 'max'"):
        mmac(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), 0.1, reduction="max")
