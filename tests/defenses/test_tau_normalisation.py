"""Tau-normalisation: the rows against a loop, tau 0, what is left of the bias, and heads that have no such rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.defenses import TauNormalisation, TauSearch
from marginclip.errors import UserError


def normalised(model, clean, **settings):
    return TauNormalisation(**settings).fit(model, *clean)


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("keep_bias", [False, True])
def test_rows_are_divided_by_a_power_of_their_length(victim, clean, tau, keep_bias):
    repaired = normalised(victim, clean, tau=tau, keep_bias=keep_bias).network
    for row, old in zip(repaired[9].weight, victim[9].weight, strict=True):
        length = sum(float(value) ** 2 for value in old.tolist()) ** 0.5
        assert row.tolist() == pytest.approx([float(value) / length**tau for value in old.tolist()], rel=1e-5)
    assert torch.equal(repaired[9].bias, victim[9].bias if keep_bias else torch.zeros(4))
    same = {name: value for name, value in repaired.state_dict().items() if not name.startswith("9.")}
    assert all(torch.equal(value, victim.state_dict()[name]) for name, value in same.items())


def test_tau_0_is_the_model_up_to_its_bias(victim, clean):
    with torch.no_grad():
        repaired = normalised(victim, clean, tau=0).network
        torch.testing.assert_close(repaired(clean[0]) + victim[9].bias, victim(clean[0]))
        assert torch.equal(normalised(victim, clean, tau=0, keep_bias=True).network(clean[0]), victim(clean[0]))


def test_tau_1_makes_all_rows_equally_long(victim, clean):
    repaired = normalised(victim, clean, tau=1).network
    torch.testing.assert_close(repaired[9].weight.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("keep_bias", [False, True])
def test_auto_takes_what_is_best_on_the_clean_set(victim, clean, keep_bias):
    """Scores of the search are those of networks that were normalised one by one."""
    images = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    clean = images, victim(images).argmax(1)
    with torch.no_grad():
        victim[9].weight.mul_(torch.tensor([4.0, 1.0, 0.6, 0.3])[:, None])  # the first class is preferred by its length
    defense = normalised(victim, clean, keep_bias=keep_bias, search=TauSearch(step=0.25))
    accuracies = []
    for tau in TauSearch(step=0.25).grid():
        network = normalised(victim, clean, tau=tau, keep_bias=keep_bias).network
        accuracies.append(float((network(clean[0]).argmax(1) == clean[1]).double().mean()))
    assert defense.arrays["tau/score"].tolist() == pytest.approx(accuracies)
    assert len(set(accuracies)) > 2
    assert defense.findings["tau"] == TauSearch(step=0.25).grid()[accuracies.index(max(accuracies))] > 0
    assert defense.findings["row_lengths"] == pytest.approx(victim[9].weight.norm(dim=1).tolist())


def test_a_row_of_zeros_and_a_layer_without_bias(victim, clean):
    model = nn.Sequential(*list(victim)[:-1], nn.Linear(8, 4, bias=False)).eval()
    with torch.no_grad():
        model[9].weight[2] = 0
    repaired = normalised(model, clean, tau=1).network
    assert torch.equal(repaired[9].weight[2], torch.zeros(8))
    assert repaired[9].bias is None


class ScaledCosine(nn.Module):
    """A scaled cosine classifier, as the losses for imbalanced data take it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, features):
        return 30 * F.linear(F.normalize(features), F.normalize(self.weight))


def test_a_cosine_head_is_refused_and_the_reason_said(victim, clean):
    model = nn.Sequential(*list(victim)[:-1], ScaledCosine()).eval()
    with pytest.raises(UserError, match=r"nn\.Linear layer, whose rows tau-normalisation scales; use defense=logit_adjustment"):
        normalised(model, clean)


def test_a_negative_tau_is_refused():
    with pytest.raises(UserError, match=r"defense\.tau must be a number from 0 up or auto, got -0\.5"):
        TauNormalisation(tau=-0.5)
