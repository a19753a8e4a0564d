"""Tau-normalisation (Kang et al., ICLR 2020): the rows of the final linear layer brought towards one length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marginclip.defenses.base import ComputedDefense, RepairResult
from marginclip.defenses.posthoc.tau_search import TauSearch, check_tau, chosen_tau
from marginclip.networks.copies import own_copy
from marginclip.networks.heads import final_linear, linear_inputs, new_linear, with_head
from marginclip.networks.logits import check_clean_set, clean_logits


class TauNormalisation(ComputedDefense):
    """Divides every row w_c of the final linear layer by its length to the power ``tau``, and drops the bias.

    Args:
        tau: a number, 0 for the row as it is and 1 for unit length; or ``auto``: the best of ``search`` on the clean set.
        keep_bias: leaves the bias as it is.
        search: the grid of ``tau=auto``. None: that of Kang et al., by the accuracy.
        seed: has no effect: nothing is drawn.

    Raises:
        UserError: for a setting outside its range; by ``fit`` for a model whose logits do not come from a linear layer.
    """

    label = "tau-normalisation"
    bounds_activations = False

    def __init__(
        self, *, tau: float | str = "auto", keep_bias: bool = False, search: TauSearch | None = None, seed: int = 0
    ) -> None:
        del seed  # nothing is random
        check_tau(tau)
        self.tau, self.keep_bias, self.search = tau, keep_bias, search or TauSearch()

    def compute(self, model: nn.Module, images: Tensor, labels: Tensor) -> RepairResult:
        """Chooses tau, and puts a layer with other weights in the place of the copy's last one."""
        check_clean_set(images, labels, clean_logits(model, images[:2]).shape[1])
        network = own_copy(model)
        name, linear = final_linear(
            network, images, needed_for="whose rows tau-normalisation scales", instead="defense=logit_adjustment or defense=lws"
        )
        inputs, weight = linear_inputs(network, linear, images).double(), linear.weight.detach().cpu().double()
        kept = linear.bias.detach().cpu().double() if self.keep_bias and linear.bias is not None else 0.0
        tau, arrays = chosen_tau(self.tau, self.search, lambda tau: inputs @ normalised(weight, tau).T + kept, labels.cpu())
        lengths = linear.weight.detach().cpu().float().norm(dim=1).tolist()
        head = new_linear(linear, normalised(linear.weight, tau), linear.bias if self.keep_bias else None)
        findings = {"tau": tau, "row_lengths": lengths}
        return RepairResult(with_head(network, name, head), findings=findings, arrays=arrays)


def normalised(weight: Tensor, tau: float) -> Tensor:
    """The rows of ``weight`` (K, F), each divided by its Euclidean length to the power ``tau``; a row of zeros stays as it is."""
    lengths = weight.norm(dim=1, keepdim=True)
    return weight / torch.where(lengths > 0, lengths, 1.0).pow(tau)
