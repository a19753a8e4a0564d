"""Fine-tuning on the clean set: the plain control, and the training loop of every peer that changes weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from marginclip.defenses.base import History, LearningDefense
from marginclip.errors import require
from marginclip.networks.copies import trainable_copy
from marginclip.networks.layout import in_layout, training_layout
from marginclip.networks.logits import check_clean_set, clean_logits

log = logging.getLogger(__name__)
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
ENOUGH_FOR_STATISTICS = 1000


class FineTune(LearningDefense):
    """Fine-tunes a copy of the model on the clean set by cross entropy with SGD.

    Order, augmentation and dropout follow from ``seed`` and the step alone. A method built on it overrides :meth:`prepare`,
    :meth:`augmented`, :meth:`loss`, :meth:`rate`, or :meth:`before_epoch`.

    Args:
        epochs: passes over the clean set.
        batch_size: images in a step at most; batches of a pass have (nearly) equal sizes.
        learning_rate: of SGD.
        momentum: of SGD.
        nesterov: Nesterov's momentum.
        weight_decay: of SGD.
        batch_norm: ``train`` moves the batch norms' running statistics. ``frozen`` keeps the model's own, which is safer with few images;
            their weights are learned either way.
        augmentation: ``augmentation(images, generator)`` gives new images of the same shape. None: the images as they are.
        seed: of order, augmentation and dropout.

    Raises:
        UserError: for a setting outside its range.
    """

    label = "fine-tuning"
    bounds_activations = False
    clean_per_class = 500
    images: Tensor
    labels: Tensor

    def __init__(
        self,
        *,
        epochs: int = 10,
        batch_size: int = 128,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 5e-4,
        batch_norm: str = "train",
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(epochs >= 1, f"defense.epochs must be at least 1, got {epochs}")
        require(batch_size >= 2, f"defense.batch_size must be at least 2, got {batch_size}")
        require(learning_rate > 0, f"defense.learning_rate must be positive, got {learning_rate:g}")
        require(0 <= momentum < 1, f"defense.momentum must be in [0, 1), got {momentum:g}")
        require(momentum > 0 or not nesterov, "defense.nesterov needs a defense.momentum above 0")
        require(weight_decay >= 0, f"defense.weight_decay must not be negative, got {weight_decay:g}")
        require(batch_norm in ("train", "frozen"), f"defense.batch_norm must be 'train' or 'frozen', got '{batch_norm}'")
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.batch_norm, self.augmentation, self.seed = batch_norm, augmentation, seed
        self.history: History = []

    # -- the defense contract -------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Copy the model and keep the clean set: all of it, whatever the model makes of it."""
        check_clean_set(images, labels, clean_logits(model, images).shape[1])
        require(len(images) >= 2, f"fine-tuning needs at least 2 clean images, got {len(images)}")
        if self.batch_norm == "train" and len(images) < ENOUGH_FOR_STATISTICS:
            log.info(
                "batch-norm statistics are re-estimated from %d clean images; defense.batch_norm=frozen keeps the model's", len(images)
            )  # fmt: skip
        self.learn_from(trainable_copy(model), in_layout(images, training_layout(model)).clone(), labels)

    def learn_from(self, network: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        """Take the network to train, what enters it (N, ...) and labels (N,); copies of both are the caller's to make."""
        self.network, self.history = network, []
        self.register_buffer("images", inputs, persistent=False)
        self.register_buffer("labels", labels.clone().to(inputs.device), persistent=False)
        self.totals: list[Tensor] = []

    def batches(self) -> DataLoader[int]:
        """One pass over the clean set; which images a step takes follows from its number."""
        return DataLoader(range(self.steps_per_epoch), batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]

    @property
    def num_epochs(self) -> int:
        return self.epochs

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the clean set."""
        return -(-len(self.images) // self.batch_size)

    def repaired(self) -> nn.Module:
        """The fine-tuned network."""
        return self.network.eval()

    # -- what a method overrides ----------------------------------------------------------------------------------------------

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        del epoch
        return self.learning_rate

    def before_epoch(self, epoch: int) -> None:
        """Set the modes of the networks for an epoch."""
        del epoch
        set_training(self.network, batch_norm=self.batch_norm)

    def augmented(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The batch to train on, from images (B, C, H, W) and labels (B,) of the clean set; neither may be changed in place."""
        return (images if self.augmentation is None else self.augmentation(images, generator)), labels

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, as :meth:`augmented` gave it."""
        return F.cross_entropy(self.network(images).float(), labels)

    # -- learning -------------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), self.rate(0), self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay
        )

    def on_train_epoch_start(self) -> None:
        epoch = self.current_epoch
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.rate(epoch)
        self.before_epoch(epoch)
        self.totals.clear()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows = self._rows(self.current_epoch, batch_idx)
        generator = torch.Generator().manual_seed(self._draw(self.current_epoch, 1 + batch_idx))
        images, labels = self.augmented(self.images[rows], self.labels[rows], generator)
        if images.dim() == 4:
            images = in_layout(images, training_layout(self.network))  # augmentation gives channels-last images
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # dropout draws the same in a resumed run, and nobody else draws differently
            torch.manual_seed(self._draw(self.current_epoch, 1 + batch_idx))
            loss = self.loss(images, labels)
        self.totals.append(loss.detach())
        self.log("defense/loss", loss.detach(), prog_bar=True, batch_size=len(rows))
        return loss

    def on_train_epoch_end(self) -> None:
        mean = float(torch.stack(self.totals).mean())
        require(math.isfinite(mean), f"fine-tuning diverged: the loss is {mean}; try a lower defense.learning_rate")
        self.history.append({"loss": mean})

    def _rows(self, epoch: int, index: int) -> Tensor:
        """The rows of the clean set of one batch: each epoch another order that depends on the seed and the epoch alone."""
        generator = torch.Generator().manual_seed(self._draw(epoch, 0))
        order = torch.randperm(len(self.images), generator=generator)
        return order.tensor_split(self.steps_per_epoch)[index].to(self.images.device)

    def _draw(self, epoch: int, index: int) -> int:
        """A seed for each step of each epoch; index 0 is the epoch's order."""
        return ((self.seed * 1_000_003 + epoch) * 100_003 + index) % 2**63

    # -- resuming -------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fine_tuning"] = {"history": self.history}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = checkpoint["fine_tuning"]["history"]


def set_training(network: nn.Module, *, batch_norm: str) -> None:
    """Training mode, but evaluation mode for the batch norms where their statistics are ``frozen``."""
    network.train()
    if batch_norm == "frozen":
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
