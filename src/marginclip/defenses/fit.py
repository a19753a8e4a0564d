"""Running a defense: one repair, or a cross-fitted one whose every clean image is judged by bounds that never saw it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses.base import Defense
from marginclip.defenses.clipping.bound_learning import BoundLearning
from marginclip.errors import require
from marginclip.networks.logits import clean_logits, warn_if_poor
from marginclip.networks.tracing import check_traceable
from marginclip.precision import precision_for

log = logging.getLogger(__name__)

TrainerFactory = Callable[[int], L.Trainer]


def quiet_trainer(max_epochs: int, **settings: Any) -> L.Trainer:
    """A Trainer that writes nothing: no logger, checkpoints, progress bar or adverts."""
    options: dict[str, Any] = {
        "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return L.Trainer(max_epochs=max_epochs, **(options | settings))


def fit_defense(
    defense: Defense,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    make_trainer: TrainerFactory = quiet_trainer,
    resume: Any = None,
) -> nn.Module:
    """Repair ``model`` from clean images (N, C, H, W) in [0, 1] and labels (N,); returns the repaired network, on its device.

    ``make_trainer`` makes a Trainer from a number of epochs; ``resume`` is the checkpoint to go on from. Gradients are on for it and
    as they were afterwards, in inference mode too; a defense that was used before begins anew.
    """
    with torch.inference_mode(False), torch.enable_grad():
        images, labels = (
            value.clone() if isinstance(value, Tensor) and value.is_inference() else value for value in (images, labels)
        )
        defense.prepare(model, images, labels)
        if defense.learns:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = make_trainer(defense.num_epochs)
                trainer.fit(defense, defense.batches(), ckpt_path=resume, weights_only=True if resume else None)
            parameter = next(model.parameters(), None)
            defense.to(images.device if parameter is None else parameter.device)  # Lightning leaves it on the CPU
        return defense.repaired()


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
    make_defense: Callable[[], Defense],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    folds: int = 2,
    seed: int = 0,
    make_trainer: TrainerFactory = quiet_trainer,
) -> Tensor:
    """Logits (N, K) of repaired networks on clean images, each image by bounds learned without its fold.

    They stand for what the repaired network does on images that it has never seen, which is what a detector's null
    distribution should be fitted to.
    """
    require(folds >= 2, f"cross-fitting needs at least 2 folds, got {folds}")
    fold = stratified_folds(labels.cpu(), folds, seed)
    require(
        len(fold.unique()) == folds,
        f"cross-fitting over {folds} folds needs at least {folds} clean images of a class: raise clean_per_class, or set "
        "defense.detector.folds=0",
    )
    logits: Tensor | None = None
    for held_out in range(folds):
        inside = fold != held_out
        repaired = fit_defense(make_defense(), model, images[inside], labels[inside], make_trainer=make_trainer)
        part = clean_logits(repaired, images[~inside]).cpu()
        logits = torch.zeros(len(images), part.shape[1]) if logits is None else logits
        logits[~inside] = part
    assert logits is not None
    return logits


def repair(
    model: nn.Module, images: Tensor, labels: Tensor, *, defense: BoundLearning | None = None, precision: str = "auto"
) -> BoundedNetwork:
    """Repair a classifier without its training set: a bounded copy of ``model``, learned from a few clean images.

    ``images`` (N, C, H, W) in [0, 1], about 50 of every class; ``labels`` (N,) int64. ``model`` is any torch network that
    torch.fx can trace, takes images in [0, 1] and gives logits; it is not changed. ``defense`` holds other settings than the
    default ones; ``precision="auto"`` learns in bf16 where the device computes in it. Raises :class:`UserError` for images,
    labels or models that do not fit.
    """
    check_traceable(model)
    warn_if_poor(model, images, labels)
    repaired = fit_defense(
        defense or BoundLearning(),
        model,
        images,
        labels,
        make_trainer=lambda epochs: quiet_trainer(epochs, precision=precision_for(precision)),
    )
    assert isinstance(repaired, BoundedNetwork)
    return repaired
