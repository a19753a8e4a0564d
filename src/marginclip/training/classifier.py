"""Training a classifier: cross entropy, any torch optimizer, a schedule over the run's own length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.errors import UserError

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[..., torch.optim.lr_scheduler.LRScheduler]


class ClassifierTraining(L.LightningModule):
    """Minimises the cross entropy of batches ``{"images": (B, C, H, W), "labels": (B,)}``.

    ``optimizer`` makes an optimizer from parameters; ``scheduler`` makes a schedule from ``(optimizer, total_steps=...)`` and is
    stepped after every batch. Raises :class:`UserError` when the loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.make_optimizer, self.make_scheduler, self.label_smoothing = optimizer, scheduler, label_smoothing

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch["images"]), batch["labels"], label_smoothing=self.label_smoothing)
        if batch_idx % 50 == 0:
            if not torch.isfinite(loss):
                raise UserError(f"training diverged: the loss is {loss.item()}; try a lower training.optimizer.lr")
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.model.parameters())
        if self.make_scheduler is None:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        schedule = self.make_scheduler(optimizer, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
