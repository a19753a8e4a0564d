"""The scalar objective against loops in plain Python, and what its terms must not do."""

import pytest
import torch

from marginclip.clipping import BoundedNetwork
from marginclip.errors import UserError
from marginclip.maxmargin.margin import margin
from marginclip.maxmargin.objectives import mmac

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


def test_an_unknown_reduction_is_refused():
    with pytest.raises(UserError, match="'mean' or 'sum', got 'max'"):
        mmac(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), 0.1, reduction="max")
