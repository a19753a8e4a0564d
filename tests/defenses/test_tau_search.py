"""The search for tau: the grid, the scores and ties against a loop, and settings that make no sense."""

import logging

import pytest
import torch

from marginclip.defenses.posthoc.tau_search import TauSearch, check_tau
from marginclip.errors import UserError

LOGITS = torch.tensor([[2.0, 0.0], [2.0, 0.0], [1.05, 0.0], [3.0, 0.0], [0.6, 0.0]])
LABELS = torch.tensor([0, 0, 1, 0, 1])
BIAS = torch.tensor([1.0, 0.0])


def corrected(tau):
    return LOGITS - tau * BIAS


def test_the_official_grid_is_the_default():
    assert TauSearch().grid() == pytest.approx([index / 10 for index in range(21)], abs=0)
    assert TauSearch(largest=1.0, step=0.3).grid() == [0.0, 0.3, 0.6, 0.9]


def test_accuracy_of_every_tau_and_the_smallest_of_the_best():
    search = TauSearch()
    scores = search.scores(corrected, LABELS)
    slow = [
        sum(int((row[0] - tau) < row[1]) == label for row, label in zip(LOGITS, LABELS, strict=True)) / 5
        for tau in search.grid()
    ]
    assert scores.tolist() == pytest.approx([float(score) for score in slow])
    assert scores[scores == scores.max()].numel() > 1, "choose logits where several tie"
    assert search.best(scores) == 1.1


def test_nll_of_every_tau():
    search = TauSearch(largest=3.0, step=0.5, by="nll")
    scores = search.scores(corrected, LABELS)
    slow = [
        -sum(
            float(torch.logsumexp(row - tau * BIAS, 0) - (row - tau * BIAS)[label])
            for row, label in zip(LOGITS, LABELS, strict=True)
        )
        / 5
        for tau in search.grid()
    ]
    assert scores.tolist() == pytest.approx(slow)
    assert search.best(scores) == search.grid()[slow.index(max(slow))]


def test_the_end_of_the_grid_is_said(caplog):
    search = TauSearch(largest=0.5)
    with caplog.at_level(logging.WARNING):
        assert search.best(search.scores(lambda tau: LOGITS * 0 + tau * torch.tensor([0.0, 1.0]), LABELS * 0 + 1)) == 0.1
        assert not caplog.records
        assert search.best(torch.arange(6.0)) == 0.5
    assert "defense.search.largest" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 0.0}, r"search\.step must be positive"),
        ({"largest": 0.05}, r"search\.largest must be from one to 1000 steps of 0\.1, got 0\.05"),
        ({"by": "acc"}, r"search\.by must be 'accuracy' or 'nll', got 'acc'"),
    ],
)
def test_settings_that_make_no_sense_name_their_key(settings, message):
    with pytest.raises(UserError, match=message):
        TauSearch(**settings)


@pytest.mark.parametrize("tau", [-1, -0.1, float("inf"), float("nan"), "best", True, None])
def test_tau_is_a_number_from_0_up_or_auto(tau):
    with pytest.raises(UserError, match=r"^defense\.tau must be a number from 0 up or auto, got "):
        check_tau(tau)
    for good in (0, 1.5, "auto"):
        check_tau(good)
