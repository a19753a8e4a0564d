"""What a victim is trained from: the data under its attack, the model, its loss."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn

from marginclip.attacks import Attack
from marginclip.data import Augment, ImageData, Splits
from marginclip.data.clean import automatic_sizes
from marginclip.errors import UserError, first_line, require
from marginclip.experiment.groups import Choice
from marginclip.experiment.objects import make_model
from marginclip.experiment.spec import RunSpec
from marginclip.losses import Loss

log = logging.getLogger(__name__)
DEFAULT_CLEAN_PER_CLASS = 50  # where there is no defense that says how many images it takes


@dataclass(frozen=True)
class VictimSetup:
    """The data under its attack, and a fresh model of the right shape, with the head that ``loss`` needs (None: cross entropy)."""

    splits: Splits
    attack: Attack | None
    data: ImageData
    model: nn.Module
    loss: Loss | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.splits.held_out.classes

    @property
    def training_counts(self) -> list[int]:
        """Training images of every class, before any poisoning."""
        counts: list[int] = self.splits.train.labels.bincount(minlength=len(self.classes)).tolist()
        return counts

    @property
    def target_class(self) -> int | None:
        """The one class that all triggered images go to; None without an attack, or where there are several."""
        return getattr(self.attack.x2x, "target", None) if self.attack is not None else None


def build_setup(spec: RunSpec, *, clean_per_class: int | None = None) -> VictimSetup:
    """Load the data and build attack, data module and model; everything random is drawn from the seed.

    ``clean_per_class`` is the clean-set size of the defense, which ``clean_per_class=auto`` takes.
    """
    splits = load_splits(spec)
    attack = build_attack(spec, splits)
    clean, reserve = clean_sizes(spec, splits.held_out.labels, clean_per_class)
    data = ImageData(
        splits,
        attack=attack,
        augment=Augment(**spec.dataset.augment),
        batch_size=spec.training.batch_size,
        clean_per_class=clean,
        clean_order=spec.clean_order,
        reserve_per_class=reserve,
        seed=spec.seed,
    )
    loss = build_loss(spec, attack)
    model = build_model(spec, len(data.classes), splits.image_shape)
    if loss is not None:
        model = loss.head(model, len(data.classes)) if spec.from_checkpoint else loss.adapt(model, data.class_counts)
    return VictimSetup(splits, attack, data, model, loss)


def load_splits(spec: RunSpec) -> Splits:
    """Training and held-out images, the former thinned out where the run asks for imbalance.

    Where a model is given, nothing is trained: all images of a set that brings no split of its own are held out. A ``held_out_share``
    that was changed from its default stays, and so does that of images that ship.
    """
    nothing_trained = spec.from_checkpoint and _has_usual_share(spec.dataset.choice)
    splits: Splits = spec.dataset.source(**({"held_out_share": 1.0} if nothing_trained else {})).load()
    require(
        spec.from_checkpoint or len(splits.train.labels) > 0,
        f"dataset.held_out_share={spec.dataset.choice.settings.get('held_out_share')} leaves no image to train a victim on",
    )
    return splits if spec.imbalance is None else spec.imbalance.make()(splits)


def _has_usual_share(choice: Choice) -> bool:
    """Whether the data set takes a share to hold out, and has the default of its class, where its images do not ship."""
    usual = inspect.signature(choice.target).parameters.get("held_out_share")
    return (
        usual is not None
        and not getattr(choice.target, "ships", False)
        and choice.settings.get("held_out_share") == usual.default
    )


def build_attack(spec: RunSpec, splits: Splits) -> Attack | None:
    """The attack on these images, in its X2X setting."""
    if spec.attack is None or spec.x2x is None:
        return None
    x2x = spec.x2x.make(num_classes=len(splits.held_out.classes), seed=spec.seed)
    attack: Attack = spec.attack.make(x2x=x2x, image_shape=splits.image_shape, seed=spec.seed)
    return attack


def build_loss(spec: RunSpec, attack: Attack | None = None) -> Loss | None:
    """The loss, None for the cross entropy; refuses an ``attack`` that trains the victim in its own way."""
    if spec.loss is None:
        return None
    require(
        attack is None or attack.trained_by == Attack.trained_by,
        f"loss={spec.loss.name} does not go with attack={spec.attack.name if spec.attack else ''}, which trains the victim in its own "
        "way; use loss=cross_entropy",
    )
    loss: Loss = spec.loss.make()
    return loss


def clean_sizes(spec: RunSpec, labels: Tensor, wanted: int | None) -> tuple[int | None, int]:
    """Images a class of the clean set (None: all) and of the reserve, from ``clean_per_class`` and ``reserve_per_class``.

    ``auto`` is the defense's own clean-set size, ``wanted``, and a reserve that is the same for every defense; both are limited to
    half of the smallest class of the held-out split, whose ``labels`` (N,) are given.
    """
    own = DEFAULT_CLEAN_PER_CLASS if wanted is None else wanted
    clean, reserve = automatic_sizes(labels, own)
    if spec.reserve_per_class != "auto":
        reserve = spec.reserve_per_class or 0  # type: ignore[assignment]
        clean = own
    if spec.clean_per_class != "auto":
        return spec.clean_per_class, reserve  # type: ignore[return-value]
    if clean < own and spec.defense is not None:
        log.warning(
            "the clean set has %d images a class, not the usual %d of defense=%s, because half of the smallest class is kept for "
            "evaluation; clean_per_class=N sets another number", clean, own, spec.defense.choice.name,
        )  # fmt: skip
    return clean, reserve


def build_model(spec: RunSpec, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """A fresh model, initialised from the seed, checked to take images of the data set's shape."""
    L.seed_everything(spec.seed, verbose=False)
    model = make_model(spec.model.settings, num_classes=num_classes, in_channels=image_shape[0])
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *image_shape))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        size = " x ".join(str(side) for side in image_shape)
        raise UserError(f"the model does not take the data set's images of {size} ({first_line(error)})") from error
    require(isinstance(logits, Tensor), f"the model must return one tensor of logits, not a {type(logits).__name__}")
    require(logits.shape == (2, num_classes), f"the model must give logits (N, {num_classes}), got {tuple(logits.shape)}")
    return model.train()
