"""Tau-normalisation (Kang et al., ICLR 2020): the rows of the final linear layer brought towards one length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from marginclip.defenses.base import Defense
from marginclip.defenses.posthoc.tau_search import TauSearch, check_tau
from marginclip.networks.copies import own_copy
from marginclip.networks.heads import final_linear, linear_inputs, new_linear, with_head
from marginclip.networks.logits import check_clean_set, clean_logits


class TauNormalisation(Defense):
    """Divides every row w_c of the final linear layer by its length to the power ``tau``, and drops the bias.

    ``tau`` is a number, 0 for the row as it is and 1 for unit length, or ``auto``: the best of ``search`` on the clean set.
    ``keep_bias`` leaves the bias as it is. Raises :class:`UserError` for a model whose logits do not come from a linear layer.
    """

    learns = False

    def __init__(
        self, *, tau: float | str = "auto", keep_bias: bool = False, search: TauSearch | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        del seed  # nothing is random
        check_tau(tau)
        self.tau, self.keep_bias, self.search = tau, keep_bias, search or TauSearch()
        self.history: list[dict[str, float]] = []
        self.scores: Tensor | None = None

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Choose tau, and put a layer with other weights in the place of the copy's last one."""
        check_clean_set(images, labels, clean_logits(model, images[:2]).shape[1])
        network = own_copy(model)
        name, linear = final_linear(
            network, images, needed_for="whose rows tau-normalisation scales", instead="defense=logit_adjustment or defense=lws"
        )
        self.norms = linear.weight.detach().cpu().float().norm(dim=1)
        self.chosen_tau = self._choose(linear, linear_inputs(network, linear, images), labels.cpu())
        bias = linear.bias if self.keep_bias else None
        self.network = with_head(network, name, new_linear(linear, normalised(linear.weight, self.chosen_tau), bias))

    def repaired(self) -> nn.Module:
        return self.network

    def findings(self) -> dict[str, Any]:
        """The tau that was taken, and the lengths of the rows as they were."""
        return {"tau": self.chosen_tau, "row_lengths": self.norms.tolist()}

    def arrays(self) -> dict[str, Tensor]:
        """The scores on the grid, where tau was searched."""
        if self.scores is None:
            return {}
        return {"tau/grid": torch.tensor(self.search.grid()), "tau/score": self.scores.float()}

    def _choose(self, linear: nn.Linear, inputs: Tensor, labels: Tensor) -> float:
        if not isinstance(self.tau, str):
            return float(self.tau)
        weight = linear.weight.detach().cpu().double()
        bias = linear.bias.detach().cpu().double() if self.keep_bias and linear.bias is not None else 0.0
        self.scores = self.search.scores(lambda tau: inputs.double() @ normalised(weight, tau).T + bias, labels)
        return self.search.best(self.scores)


def normalised(weight: Tensor, tau: float) -> Tensor:
    """The rows of ``weight`` (K, F), each divided by its Euclidean length to the power ``tau``; a row of zeros stays as it is."""
    lengths = weight.norm(dim=1, keepdim=True)
    return weight / torch.where(lengths > 0, lengths, 1.0).pow(tau)
