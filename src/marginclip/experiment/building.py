"""Objects from a composed configuration: the only place, with the entry points, that knows Hydra."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from marginclip.attacks import Attack
from marginclip.data import Augment, ImageData, Splits
from marginclip.data.clean import automatic_sizes
from marginclip.errors import UserError, first_line, require
from marginclip.experiment.types import check_types
from marginclip.losses import Loss

log = logging.getLogger(__name__)


def instantiate(config: Any, *positional: Any, key: str, **settings: Any) -> Any:
    """Hydra's ``instantiate`` whose failures name the configuration ``key`` and, for a user's mistake, nothing else.

    The entry ``name`` of a group is its label for folders and tables, no constructor argument.
    """
    config = without_labels(config)
    check_types(plain_values(config), key)
    try:
        return hydra_instantiate(config, *positional, **settings)
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        reason = error.__cause__ or error
        if isinstance(reason, (TypeError, ValueError, LookupError, OSError, MisconfigurationException)):
            raise UserError(f"{key}: {first_line(reason)}") from error
        raise


def without_labels(config: Any) -> Any:
    """The configuration without the entry ``name`` of the groups in it, as dictionaries."""
    if not isinstance(config, (dict, DictConfig)):
        return config
    return {name: without_labels(value) for name, value in config.items() if name != "name"}


def plain_values(config: Any) -> Any:
    """Dictionaries whose interpolations are resolved."""
    return OmegaConf.to_container(OmegaConf.create(config), resolve=True) if isinstance(config, dict) else config


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration with all interpolations resolved, as plain containers."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


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


def build_setup(config: DictConfig) -> VictimSetup:
    """Load the data and build attack, data module and model; everything random is drawn from ``config.seed``."""
    seed = config.seed
    require(
        isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32,
        f"seed must be an integer from 0 up, below 2^32, got {seed!r}",
    )
    batch_size = config.training.batch_size
    require(isinstance(batch_size, int) and batch_size >= 1, f"training.batch_size must be at least 1, got {batch_size!r}")
    epochs = config.training.epochs
    require(
        isinstance(epochs, int) and not isinstance(epochs, bool) and epochs >= 1,
        f"training.epochs must be a whole number from 1 up, got {epochs!r}",
    )
    source_config = {key: value for key, value in config.dataset.items() if key not in ("augment", "bounds_start")}
    trained = config.get("victim", {}).get("kind") != "checkpoint"
    if "held_out_share" in source_config and not trained:
        source_config["held_out_share"] = 1.0  # nothing is trained: no image need be kept for training
    splits: Splits = instantiate(source_config, key="dataset").load()
    require(
        not trained or len(splits.train.labels) > 0,
        f"dataset.held_out_share={config.dataset.get('held_out_share')} leaves no image to train a victim on",
    )
    if (config.get("imbalance") or {}).get("_target_") is not None:  # records of before that group existed have none
        splits = instantiate(config.imbalance, key="imbalance")(splits)
    classes = splits.held_out.classes
    x2x = instantiate(config.x2x, num_classes=len(classes), seed=config.seed, key="x2x")
    attack = instantiate(config.attack, x2x=x2x, image_shape=splits.image_shape, seed=config.seed, key="attack")
    clean_per_class, reserve_per_class = clean_sizes(config, splits.held_out.labels)
    data = ImageData(
        splits,
        attack=attack,
        augment=Augment(**config.dataset.augment),
        batch_size=config.training.batch_size,
        clean_per_class=clean_per_class,
        clean_order=config.clean_order,
        reserve_per_class=reserve_per_class,
        seed=config.seed,
    )
    loss = build_loss(config, attack)
    model = build_model(config, len(classes), splits.image_shape)
    if loss is not None:
        model = loss.adapt(model, data.class_counts) if trained else loss.head(model, len(classes))
    return VictimSetup(splits, attack, data, model, loss)


def build_loss(config: DictConfig, attack: Attack | None = None) -> Loss | None:
    """The loss of the ``loss`` group, None for the cross entropy; refuses an ``attack`` that trains the victim in its own way."""
    if (config.get("loss") or {}).get("_target_") is None:  # records of before that group existed have none
        return None
    require(
        attack is None or attack.trained_by == Attack.trained_by,
        f"loss={config.loss.name} does not go with attack={config.attack.name}, which trains the victim in its own way; "
        "use loss=cross_entropy",
    )
    loss: Loss = instantiate(config.loss, key="loss")
    return loss


def training_counts(config: DictConfig, setup: VictimSetup) -> Tensor | None:
    """Training images of every class (K,) under the ``imbalance`` group; None for ``imbalance=none`` and for a checkpoint."""
    if config.imbalance["_target_"] is None or config.get("victim", {}).get("kind") == "checkpoint":
        return None
    counts = setup.splits.train.labels.bincount(minlength=len(setup.classes))
    return counts if int(counts.sum()) else None


def clean_sizes(config: DictConfig, labels: Tensor) -> tuple[int | None, int]:
    """Images a class of the clean set (None: all) and of the reserve, from ``clean_per_class`` and ``reserve_per_class``.

    ``auto`` is the defense's own clean-set size, and a reserve that is the same for every defense; both are limited to half
    of the smallest class of the held-out split, whose ``labels`` (N,) are given.
    """
    for key in ("clean_per_class", "reserve_per_class"):
        value = config[key]
        require(
            value in ("auto", None) or (isinstance(value, int) and not isinstance(value, bool)),
            f"{key} must be a number of images, auto or null, got '{value}'",
        )
    wanted = config.get("defense", {}).get("clean_per_class", 50)
    clean, reserve = automatic_sizes(labels, wanted)
    if config.reserve_per_class != "auto":
        reserve = config.reserve_per_class or 0
        clean = wanted
    if config.clean_per_class != "auto":
        clean = config.clean_per_class
    elif clean < wanted and "defense" in config:
        log.warning(
            "the clean set is %d images a class, not the %d that defense=%s takes by default: half of the smallest class is kept for "
            "evaluation (clean_per_class=N overrides)", clean, wanted, config.defense.name,
        )  # fmt: skip
    return clean, reserve


def runs_dir(config: DictConfig) -> Path:
    """The folder that everything of a run is below."""
    found = config.runs_dir
    require(isinstance(found, str) and found != "", f"runs_dir must be the name of a folder, got {found!r}")
    return Path(found)


def build_model(config: DictConfig, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """A fresh model, initialised from ``config.seed``, checked to take images of the data set's shape."""
    L.seed_everything(config.seed, verbose=False)
    model: nn.Module = instantiate(config.model, num_classes=num_classes, in_channels=image_shape[0], key="model")
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *image_shape))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        size = " x ".join(str(side) for side in image_shape)
        raise UserError(f"the model does not take the data set's images of {size} ({first_line(error)})") from error
    require(isinstance(logits, Tensor), f"the model must return one tensor of logits, not a {type(logits).__name__}")
    require(logits.shape == (2, num_classes), f"the model must give logits (N, {num_classes}), got {tuple(logits.shape)}")
    return model.train()
