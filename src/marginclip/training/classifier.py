"""Training a classifier: cross entropy or another loss, any torch optimizer, a schedule over the run's own length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.errors import UserError, first_line, require
from marginclip.losses import Loss, Network
from marginclip.networks.layout import in_layout, lay_out_for_training, training_layout

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
LOSS_STREAM = 15485863
SchedulerFactory = Callable[..., torch.optim.lr_scheduler.LRScheduler]


def made(key: str, factory: Any, *positional: Any, **settings: Any) -> Any:
    """What ``factory``, from the configuration's ``key``, makes; a setting that it does not take is told as a :class:`UserError`."""
    require(callable(factory), f"{key} must be a group of settings with a _target_, got {factory!r}")
    try:
        return factory(*positional, **settings)
    except (TypeError, ValueError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}: {first_line(error)}") from error


class ClassifierTraining(L.LightningModule):
    """Minimises the cross entropy of batches ``{"images": (B, C, H, W), "labels": (B,)}``.

    ``forward_pass`` is what a step calls for the logits: the model, unless a callback puts something else there
    (:class:`~marginclip.training.replay.CudaGraphs`). ``several_devices`` is the Trainer's strategy for several devices, None
    where a training takes one device alone.

    Args:
        model: what is trained, itself and no copy: images (B, C, H, W) to logits (B, K).
        optimizer: makes an optimizer from parameters.
        scheduler: makes a schedule from ``(optimizer, total_steps=...)``, which is stepped after every batch. None: the
            learning rate stays.
        label_smoothing: of the cross entropy, in [0, 1); 0 with another ``loss``.
        loss: takes the place of the cross entropy; it is adapted to ``model`` already. None: the cross entropy.
        seed: what ``loss`` draws follows from it and the batch alone, so an interrupted training goes on as it would have.

    Raises:
        UserError: for a ``label_smoothing`` outside its range, or that would have no effect. Every 50th step of training raises
            it when the loss is not finite.
    """

    several_devices: str | None = "ddp_spawn"

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        label_smoothing: float = 0.0,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(
            loss is None or label_smoothing == 0,
            f"training.label_smoothing acts on loss=cross_entropy alone and must be 0 with another loss, got {label_smoothing:g}",
        )
        require(
            isinstance(label_smoothing, (int, float)) and 0 <= label_smoothing < 1,
            f"training.label_smoothing must be in [0, 1), got {label_smoothing}",
        )
        self.loss, self.seed = loss, seed
        lay_out_for_training(model)
        self.model = model
        self.forward_pass: Network = self.forward
        self.make_optimizer, self.make_scheduler, self.label_smoothing = optimizer, scheduler, label_smoothing

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def on_train_epoch_start(self) -> None:
        if self.loss is not None:
            self.loss.begin_epoch(self.current_epoch, int(self.trainer.max_epochs or 1))

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        batch["images"] = in_layout(batch["images"], training_layout(self.model))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.batch_loss(batch["images"], batch["labels"])
        if batch_idx % 50 == 0:
            if not torch.isfinite(loss):
                raise UserError(f"training diverged: the loss is {loss.item()}; try a lower training.optimizer.lr")
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def batch_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of images (B, C, H, W) with labels (B,) at this step."""
        if self.loss is None:
            return F.cross_entropy(self.forward_pass(images), labels, label_smoothing=self.label_smoothing)
        return self.loss(self.forward_pass, images, labels, self.step_generator())

    def step_generator(self) -> torch.Generator:
        """What is drawn within a training step, apart from what the loader draws."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.draw + LOSS_STREAM)

    @property
    def draw(self) -> int:
        """A number of this training batch's own, among those of all devices: what is random in a step follows from it and the seed."""
        return int(self.trainer.fit_loop.total_batch_idx) * self.trainer.world_size + self.global_rank

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """What the optimizer is given: all of the model."""
        return self.model.parameters()

    def scheduled(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        """The schedule of ``optimizer`` over so many steps."""
        assert self.make_scheduler is not None
        try:
            return made("training.scheduler", self.make_scheduler, optimizer, total_steps=total_steps)
        except ZeroDivisionError as error:  # torch's one-cycle schedule of 4 steps
            raise UserError(
                f"training.scheduler cannot be spread over {total_steps} steps; raise training.epochs or lower training.batch_size"
            ) from error

    def configure_optimizers(self) -> Any:
        optimizer = made("training.optimizer", self.make_optimizer, self.trained_parameters())
        if self.make_scheduler is None:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        schedule = self.scheduled(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
