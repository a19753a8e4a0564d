"""Cross-fitting: repairs that each leave a part of the clean set out, so that every image is judged by one that never saw it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from marginclip.defenses.base import Defense, TrainerFactory
from marginclip.errors import require
from marginclip.networks.logits import clean_logits
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
    """Logits (N, K) of repaired networks on clean images, each image by a repair that was learned without its fold.

    They stand for what the repaired network does on images that it has never seen, which is what a detector's null
    distribution should be fitted to. ``track`` goes through the folds, and can show how far it is.
    """
    require(folds >= 2, f"cross-fitting needs at least 2 folds, got {folds}")
    fold = stratified_folds(labels.cpu(), folds, seed)
    require(
        len(fold.unique()) == folds,
        f"cross-fitting over {folds} folds needs at least {folds} clean images of a class: raise clean_per_class, or set "
        "defense.detector.folds=0",
    )
    logits: Tensor | None = None
    for held_out in track(range(folds)):
        inside = fold != held_out
        repaired = defense.fit(model, images[inside], labels[inside], make_trainer=make_trainer)
        part = clean_logits(repaired.network, images[~inside]).cpu()
        logits = torch.zeros(len(images), part.shape[1]) if logits is None else logits
        logits[~inside] = part
    assert logits is not None
    return logits
