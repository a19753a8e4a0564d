"""Post-hoc logit adjustment (Menon et al., ICLR 2021): the training set's class frequencies taken out of the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from marginclip.defenses.base import ComputedDefense, RepairResult
from marginclip.defenses.posthoc.affine_logits import AffineLogits
from marginclip.defenses.posthoc.tau_search import TauSearch, check_tau, chosen_tau
from marginclip.errors import nearest, require
from marginclip.networks.logits import check_clean_set, clean_logits

SOURCES = ("estimated", "known")


class LogitAdjustment(ComputedDefense):
    """Subtracts ``tau`` times the logarithm of the classes' training frequencies from the logits: f_y - tau ln pi_y.

    Args:
        tau: a number, or ``auto``: the best of ``search`` on the clean set.
        class_counts: where pi comes from. ``estimated``: the model's mean softmax over the clean set, all that a defender without the
            training set has. A list: the number of training images of every class, an oracle. ``known`` asks for these numbers whoever runs
            the defense, and is refused where nobody tells.
        search: the grid of ``tau=auto``. None: up to 4, by the cross entropy.
        seed: has no effect: nothing is drawn.

    Raises:
        UserError: for a setting outside its range; by ``fit`` where the counts are not one for each class, or not known.
    """

    label = "logit adjustment"
    bounds_activations = False
    oracles = ("class_counts",)

    def __init__(
        self,
        *,
        tau: float | str = 1.0,
        class_counts: str | Sequence[float] = "estimated",
        search: TauSearch | None = None,
        seed: int = 0,
    ) -> None:
        del seed  # nothing is random
        check_tau(tau)
        check_counts(class_counts)
        self.tau, self.class_counts, self.search = tau, class_counts, search or TauSearch(largest=4.0, by="nll")

    def compute(self, model: nn.Module, images: Tensor, labels: Tensor) -> RepairResult:
        """Finds pi and tau, and puts the correction behind a copy of the model."""
        logits = clean_logits(model, images).cpu().double()
        check_clean_set(images, labels, logits.shape[1])
        log_prior = self._log_prior(logits)
        tau, arrays = chosen_tau(self.tau, self.search, lambda tau: logits - tau * log_prior, labels.cpu())
        network = AffineLogits(model, scale=torch.ones(1), shift=-tau * log_prior)
        source = "estimated" if self.class_counts == "estimated" else "counts"
        findings = {"tau": tau, "prior": log_prior.exp().tolist(), "prior_from": source}
        return RepairResult(network, findings=findings, arrays=arrays)

    def _log_prior(self, logits: Tensor) -> Tensor:
        if self.class_counts == "estimated":
            return mean_log_softmax(logits)
        require(
            self.class_counts != "known",
            "defense.class_counts=known needs the training set, which is not known here: give the number of training images of every "
            "class as defense.class_counts=[...], or use defense.class_counts=estimated",
        )
        require(
            len(self.class_counts) == logits.shape[1],
            f"defense.class_counts must be one number for each of the {logits.shape[1]} classes, got {len(self.class_counts)}",
        )
        counts = torch.tensor([float(count) for count in self.class_counts], dtype=torch.float64)
        return counts.log() - counts.sum().log()


def mean_log_softmax(logits: Tensor) -> Tensor:
    """The logarithm (K,) of the mean softmax of logits (N, K); it does not underflow."""
    return logits.log_softmax(1).logsumexp(0) - math.log(len(logits))


def check_counts(class_counts: str | Sequence[float]) -> None:
    """Raise :class:`UserError` unless ``class_counts`` is a known word or a sequence of positive numbers."""
    if isinstance(class_counts, str):
        require(
            class_counts in SOURCES,
            f"defense.class_counts must be estimated, known or one number a class, got '{class_counts}'"
            + nearest(class_counts, SOURCES),
        )
        return
    require(
        isinstance(class_counts, Sequence),
        f"defense.class_counts must be estimated, known or one number a class, got {class_counts!r}",
    )
    positive = all(isinstance(count, (int, float)) and 0 < count < float("inf") for count in class_counts)
    require(
        positive and len(class_counts) > 0, f"defense.class_counts must be positive numbers, got {list(class_counts)}; a class without "
        "training images has no logit to adjust"
    )  # fmt: skip
