"""Training a classifier together with the networks that make its trigger."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marginclip.attacks import InputAware
from marginclip.errors import UserError
from marginclip.training.classifier import made
from marginclip.training.poisoned import PoisonedTraining


class JointTraining(PoisonedTraining):
    """:class:`PoisonedTraining` whose attack is trained too: its mask network alone first, then its generator with the classifier.

    Each step clears the gradients of everything that it steps, the generator's too (the published code lets those add up over the
    whole training).

    Args:
        *args: the model of :class:`PoisonedTraining`.
        **settings: those of :class:`PoisonedTraining`. ``attack`` must be an :class:`~marginclip.attacks.InputAware`; ``loss``
            and ``seed`` have no effect.

    Raises:
        UserError: as :class:`~marginclip.training.ClassifierTraining`.
    """

    several_devices = "ddp_spawn_find_unused_parameters_true"  # no step takes all three networks

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.automatic_optimization = False

    @property
    def trigger_networks(self) -> InputAware:
        """The attack, with its two networks."""
        assert isinstance(self.attack, InputAware)
        return self.attack

    def on_train_epoch_start(self) -> None:
        # Outside of training the networks are in evaluation mode, for whoever triggers images; Lightning leaves that as it finds it.
        self.trigger_networks.train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        attack = self.trigger_networks
        classifier, masker, generator = self._optimizers()
        self._set_rates(batch_idx)
        if self.current_epoch < attack.mask_epochs:
            loss = attack.mask_loss(batch["images"])
            self._step(loss, [masker], batch_idx)
            return
        images, labels, diversity = attack.joint_batch(batch["images"], batch["labels"], self.step_generator())
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.label_smoothing) + diversity
        self._step(loss, [classifier, generator], batch_idx)
        if (schedule := self.lr_schedulers()) is not None:
            schedule.step()  # type: ignore[union-attr]

    def _step(self, loss: Tensor, optimizers: list[Any], batch_idx: int) -> None:
        if batch_idx % 50 == 0:
            if not torch.isfinite(loss):
                raise UserError(f"training diverged: the loss is {loss.item()}; try a lower attack.learning_rate")
            self.log("train/loss", loss, prog_bar=True)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def _set_rates(self, batch_idx: int) -> None:
        attack = self.trigger_networks
        epoch = self.current_epoch + batch_idx / int(self.trainer.num_training_batches)
        factors = attack.rate_factors(epoch, self._joint_epochs)
        for optimizer, factor in zip(self._optimizers()[1:], factors, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = attack.learning_rate * factor

    def _optimizers(self) -> list[Any]:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        return optimizers

    @property
    def _joint_epochs(self) -> int:
        return int(self.trainer.max_epochs or 1) - self.trigger_networks.mask_epochs

    def configure_optimizers(self) -> Any:
        optimizer = made("training.optimizer", self.make_optimizer, self.model.parameters())
        optimizers = [optimizer, *self.trigger_networks.optimizers()]
        if self.make_scheduler is None:
            return optimizers
        steps = int(self.trainer.estimated_stepping_batches) * self._joint_epochs // int(self.trainer.max_epochs or 1)
        return optimizers, [{"scheduler": self.scheduled(optimizer, max(1, steps)), "interval": "step"}]
