"""What every defense has in common: a model and clean samples in, a repaired module out."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Defense(L.LightningModule):
    """A post-training repair, run by a Trainer: ``prepare(model, images, labels)``, ``Trainer.fit``, ``repaired()``.

    It sees the model and the clean set and nothing else: no trigger, no poisoned or test data. The model that it was given is
    never changed. ``learns`` is False where there is nothing to fit.
    """

    learns = True

    def check_model(self, model: nn.Module, image: Tensor) -> None:
        """Raise :class:`UserError`, before anything is trained, for a model, trained or not, that the method cannot work on.

        ``image`` (1, C, H, W) is of the size that the model takes.
        """

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Take the model and the clean set: images (N, C, H, W) in [0, 1], labels (N,). What an earlier repair left is forgotten."""
        raise TypeError(f"{type(self).__name__} does not say how it prepares")

    def repaired(self) -> nn.Module:
        """The repaired network, a new module that maps images to logits."""
        raise TypeError(f"{type(self).__name__} does not say what it repaired")

    def batches(self) -> DataLoader[int]:
        """What the Trainer iterates over."""
        raise TypeError(f"{type(self).__name__} does not learn")

    def variants(self) -> dict[str, nn.Module]:
        """Further networks to evaluate beside the repaired one, by the name of their row in the results."""
        return {}

    def findings(self) -> dict[str, Any]:
        """What the defense found out, for the record; plain values only."""
        return {}

    def arrays(self) -> dict[str, Tensor]:
        """Tensors to keep with the run, for figures."""
        return {}

    @property
    def num_epochs(self) -> int:
        """How many rounds over :meth:`batches` the repair takes."""
        return 0
