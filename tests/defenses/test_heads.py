"""The head of a network: which layer counts as one, what enters it, and another in its place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.errors import UserError
from marginclip.networks.heads import final_linear, linear_inputs, new_linear, with_head

ADVICE = {"needed_for": "which this needs", "instead": "defense=bias_only"}


class CosineHead(nn.Linear):
    """A linear layer by class, but not by what it does."""

    def forward(self, input):
        return 8 * F.linear(F.normalize(input), F.normalize(self.weight))


def with_cosine_head(model, head=None):
    return nn.Sequential(*list(model)[:-1], head or CosineHead(8, 4, bias=False)).eval()


def test_inputs_and_layer_give_the_logits(victim, clean):
    name, linear = final_linear(victim, clean[0], **ADVICE)
    assert (name, linear) == ("9", victim[9])
    rows = linear_inputs(victim, linear, clean[0])
    assert rows.shape == (24, 8)
    torch.testing.assert_close(rows @ linear.weight.T + linear.bias, victim(clean[0]))


def test_a_subclass_that_computes_something_else_is_no_linear_head(victim, clean):
    with pytest.raises(UserError, match=r"do not come from an nn\.Linear layer, which this needs; use defense=bias_only$"):
        final_linear(with_cosine_head(victim), clean[0], **ADVICE)


def test_a_linear_layer_whose_output_is_scaled_afterwards_is_no_head(victim, clean):
    class Twice(nn.Module):
        def forward(self, logits):
            return 2 * logits

    with pytest.raises(UserError, match="do not come from"):
        final_linear(nn.Sequential(victim, Twice()), clean[0], **ADVICE)
    name, _ = final_linear(nn.Sequential(victim, nn.Identity()), clean[0], **ADVICE)
    assert name == "0.9"


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_is_a_copy_and_draws_nothing(bias):
    old = nn.Linear(3, 5, bias=bias)
    state = torch.get_rng_state()
    new = new_linear(old, 2 * old.weight, old.bias)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(new.weight, 2 * old.weight)
    assert new.state_dict().keys() == old.state_dict().keys()
    assert new.bias is None if not bias else torch.equal(new.bias, old.bias)
    dropped = new_linear(old, old.weight, None)
    assert dropped.bias is None if not bias else torch.equal(dropped.bias, torch.zeros(5))
    assert new.weight.data_ptr() != old.weight.data_ptr()
    assert new.weight.requires_grad


def test_weights_that_are_computed_are_taken_as_they_are_used(victim, clean):
    """A parametrised layer's weight cannot be written to; the new layer takes its place."""
    nn.utils.parametrizations.weight_norm(victim[9])
    name, linear = final_linear(victim, clean[0], **ADVICE)
    before = victim(clean[0])
    changed = with_head(victim, name, new_linear(linear, linear.weight, None))
    torch.testing.assert_close(changed(clean[0]), before - linear.bias)


def test_a_network_of_nothing_but_its_head():
    linear = nn.Linear(3, 2)
    assert with_head(linear, "", new := nn.Linear(3, 2)) is new
