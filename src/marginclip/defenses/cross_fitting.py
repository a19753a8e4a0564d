"""Cross-fitting: repairs that each leave a part of the clean set out, so that every image is judged by one that never saw it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marginclip.defenses.base import Defense, TrainerFactory
from marginclip.errors import require
from marginclip.networks.logits import class_numbers, clean_logits, smallest_class
from marginclip.silence import silent_trainer


def stratified_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """A fold number in [0, folds) for every sample (N,), each class spread evenly over the folds."""
    generator = torch.Generator().manual_seed(seed + 32452843)
    fold = torch.zeros(len(labels), dtype=torch.long)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        fold[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % folds
    return fold


def stratified_share(labels: Tensor, share: float, seed: int) -> Tensor:
    """Which samples (N,) are in a random ``share`` of every class, rounded up; a share of 1 / n is fold 0 of n folds."""
    generator = torch.Generator().manual_seed(seed + 32452843)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        due = (torch.arange(len(members), dtype=torch.float64) * share + 1e-9).floor()  # chosen by then, but for the first
        chosen[members[torch.randperm(len(members), generator=generator)]] = due.diff(prepend=torch.tensor([-1.0])) > 0
    return chosen


@dataclass(frozen=True)
class CrossFitted:
    """Repairs by the number of the ``fold`` (N,) that each left out; see :func:`cross_fitted`."""

    networks: list[nn.Module]
    fold: Tensor

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, K) of the clean images (N, C, H, W), each by the repair that never saw it; on the CPU."""
        parts = [clean_logits(network, images[self.left_out(number)]).cpu() for number, network in enumerate(self.networks)]
        logits = torch.zeros(len(images), parts[0].shape[1])
        for number, part in enumerate(parts):
            logits[self.left_out(number)] = part
        return logits

    def left_out(self, number: int) -> Tensor:
        """Which images (N,) the repair of this number never saw."""
        return self.fold == number


def check_folds(labels: Tensor, folds: int) -> None:
    """Raise :class:`UserError` unless clean images with these ``labels`` (N,) can be divided into so many ``folds``, none of them empty."""
    require(folds >= 2, f"cross-fitting needs at least 2 folds, got {folds}")
    require(
        len(labels) > 0 and int(labels.unique(return_counts=True)[1].max()) >= folds,
        f"cross-fitting over {folds} folds needs at least {folds} clean images of a class: give more, or do without "
        "(in defend.py defense.detector.folds=0, in marginclip.repair() tolerance=None)",
    )


def cross_fitted(
    defense: Defense,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    folds: int = 2,
    seed: int = 0,
    make_trainer: TrainerFactory = silent_trainer,
    track: Callable[[range], Iterable[int]] = iter,
) -> CrossFitted:
    """Repairs of ``model`` that each leave one of ``folds`` parts of the clean images (N, C, H, W) with labels (N,) out.

    They stand for the repaired network on images that it has never seen. A detector's null distribution should be fitted to
    those. A step of such a repair takes as much less as its clean set is smaller (:meth:`Defense.in_proportion`), so two folds cost
    about one repair. ``track`` goes through the folds, and can show how far it is. Raises :class:`UserError` where a fold would be empty.
    """
    labels = class_numbers(labels)
    fewest = smallest_class(model, images, labels)
    check_folds(labels, folds)
    fold = stratified_folds(labels.cpu(), folds, seed)
    with defense.in_proportion(1 - 1 / folds, fewest):
        networks = [
            defense.fit(model, images[fold != number], labels[fold != number], make_trainer=make_trainer).network
            for number in track(range(folds))
        ]
    return CrossFitted(networks, fold)


def cross_fitted_logits(
    defense: Defense,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    folds: int = 2,
    seed: int = 0,
    make_trainer: TrainerFactory = silent_trainer,
    track: Callable[[range], Iterable[int]] = iter,
) -> Tensor:
    """The logits (N, K) of :func:`cross_fitted` repairs on the clean images, each by the one that never saw it."""
    fitted = cross_fitted(defense, model, images, labels, folds=folds, seed=seed, make_trainer=make_trainer, track=track)
    return fitted.logits(images)
