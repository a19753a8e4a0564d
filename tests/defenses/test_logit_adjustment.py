"""Logit adjustment: priors and corrections against loops, cases without effect, and a shift that is known."""

import math

import pytest
import torch
from torch import nn

from marginclip.defenses import LogitAdjustment, TauSearch
from marginclip.defenses.posthoc.logit_adjustment import mean_log_softmax
from marginclip.errors import UserError


def adjusted(model, clean, **settings):
    return LogitAdjustment(**settings).fit(model, *clean)


def test_counts_given_are_log_counts_exactly(victim, clean):
    counts = [800, 90, 10, 100]
    repaired = adjusted(victim, clean, class_counts=counts, tau=1.5).network
    with torch.no_grad():
        for image, row in zip(clean[0], repaired(clean[0]), strict=True):
            slow = [float(f) - 1.5 * math.log(count / 1000) for f, count in zip(victim(image[None])[0], counts, strict=True)]
            assert row.tolist() == pytest.approx(slow, abs=1e-5)


def test_estimated_prior_is_the_mean_softmax(victim, clean):
    defense = adjusted(victim, clean)
    with torch.no_grad():
        slow = torch.stack([victim(image[None])[0].softmax(0) for image in clean[0]]).mean(0)
    assert defense.findings["prior"] == pytest.approx(slow.tolist(), rel=1e-5)
    assert defense.findings["prior_from"] == "estimated"
    with torch.no_grad():
        torch.testing.assert_close(defense.network(clean[0]), victim(clean[0]) - slow.log())


def test_a_prior_too_small_for_a_float_has_a_logarithm():
    logits = torch.tensor([[0.0, -2000.0], [0.0, -1000.0]], dtype=torch.float64)
    assert mean_log_softmax(logits).tolist() == pytest.approx([0.0, -1000 - math.log(2)])


@pytest.mark.parametrize("settings", [{"tau": 0.0}, {"class_counts": [7, 7, 7, 7]}])
def test_tau_0_and_a_uniform_prior_change_nothing(victim, clean, settings):
    repaired = adjusted(victim, clean, **settings).network
    with torch.no_grad():
        before, after = victim(clean[0]), repaired(clean[0])
    torch.testing.assert_close(after.softmax(1), before.softmax(1))
    if "tau" in settings:
        assert torch.equal(after, before)


def imbalanced_bayes(counts, num=4000):
    """What training on ``counts`` gives ideally, the balanced classifier's logits plus log counts; clean images, and the former."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(num, 1, 1, len(counts), generator=generator)
    balanced = nn.Sequential(nn.Flatten(), nn.Linear(len(counts), len(counts)))
    with torch.no_grad():
        balanced[1].weight.copy_(6 * torch.eye(len(counts)))
        balanced[1].bias.zero_()
        labels = torch.multinomial(balanced(images).softmax(1), 1, generator=generator)[:, 0]
        model = nn.Sequential(nn.Flatten(), nn.Linear(len(counts), len(counts)))
        model[1].weight.copy_(balanced[1].weight)
        model[1].bias.copy_(torch.tensor(counts).log())
    return model.eval(), (images, labels), balanced.eval()


def test_a_shift_by_the_log_counts_is_undone():
    counts = [1000.0, 100.0, 30.0, 10.0]
    model, clean, balanced = imbalanced_bayes(counts)
    with torch.no_grad():
        after = adjusted(model, clean, class_counts=counts).network(clean[0])
        torch.testing.assert_close(after.softmax(1), balanced(clean[0]).softmax(1))
        assert (after.argmax(1) == clean[1]).float().mean() > (model(clean[0]).argmax(1) == clean[1]).float().mean() + 0.2


@pytest.mark.parametrize("by", ["nll", "accuracy"])
def test_the_right_strength_is_found_on_the_clean_set(by):
    """The shift is twice the logarithm of the counts, so the best tau is 2."""
    counts = [100.0, 20.0, 5.0, 1.0]
    model, clean, _ = imbalanced_bayes([count**2 for count in counts])
    defense = adjusted(model, clean, class_counts=counts, tau="auto", search=TauSearch(largest=4.0, by=by))
    assert defense.findings["tau"] == pytest.approx(2.0, abs=0.15 if by == "nll" else 0.6)
    arrays = defense.arrays
    assert len(arrays["tau/grid"]) == len(arrays["tau/score"]) == 41
    assert adjusted(model, clean, class_counts=counts).arrays == {}


def test_known_counts_that_nobody_tells_are_refused(victim, clean):
    with pytest.raises(
        UserError, match=r"^defense\.class_counts=known needs the training set.*class_counts=\[\.\.\.\], or use .*estimated$"
    ):
        adjusted(victim, clean, class_counts="known")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("knwon", r"must be estimated, known or one number a class, got 'knwon'; did you mean 'known'\?"),
        ([5, 0, 2, 1], "must be positive numbers, got"),
        ([5, -1, 2, 1], "must be positive numbers, got"),
        ([], "must be positive numbers, got"),
        (["many", "few", "few", "few"], "must be positive numbers, got"),
        ([5, 3, 2], "must be one number for each of the 4 classes, got 3"),
    ],
)
def test_counts_that_make_no_sense_are_refused(victim, clean, counts, message):
    with pytest.raises(UserError, match=r"^defense\.class_counts " + message):
        adjusted(victim, clean, class_counts=counts)


def test_a_negative_tau_is_refused():
    with pytest.raises(UserError, match=r"defense\.tau must be a number from 0 up or auto, got -1"):
        LogitAdjustment(tau=-1)
