"""Neural Cleanse: invert the trigger of the suspect class, then unlearn it (Wang et al., S&P 2019)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from marginclip.defenses.weights.finetune import FineTune
from marginclip.defenses.weights.inversion import InversionPlan, InvertedTriggers, anomaly_indices, invert_triggers, paste
from marginclip.errors import require
from marginclip.networks.copies import frozen_copy
from marginclip.networks.layout import channels_last
from marginclip.networks.logits import clean_logits

log = logging.getLogger(__name__)
SUSPECTS = ("auto", "known")


class NeuralCleanse(FineTune):
    """Inverts the trigger of the suspect class, then fine-tunes a copy of the model with it under the true labels.

    The trigger is pasted before the augmentation. Of several suspects one is drawn for every image.

    Args:
        suspect_class: the class whose trigger is inverted (the papers give the true target: an oracle), or ``auto``: all classes are
            inverted, and those are suspected whose mask is much smaller than the others'. Where there is none, the model is left as it is.
            ``known`` asks for the class whoever runs the defense, and means ``auto`` where nobody tells.
        anomaly_threshold: of ``auto``, in robust standard deviations.
        inversion: how triggers are inverted. None: its defaults.
        share: part of every batch that carries the trigger.
        epochs: passes over the clean set.
        **settings: those of :class:`FineTune`.
    """

    label = "Neural Cleanse"
    oracles = ("suspect_class",)

    def __init__(
        self,
        *,
        suspect_class: int | str = "auto",
        anomaly_threshold: float = 2.0,
        inversion: InversionPlan | None = None,
        share: float = 0.2,
        epochs: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(epochs=epochs, **settings)
        number = isinstance(suspect_class, int) and not isinstance(suspect_class, bool) and suspect_class >= 0
        require(
            number or suspect_class in SUSPECTS,
            f"defense.suspect_class must be the number of a class, auto or known, got '{suspect_class}'",
        )
        require(anomaly_threshold > 0, f"defense.anomaly_threshold must be positive, got {anomaly_threshold:g}")
        require(0 < share <= 1, f"defense.share must be in (0, 1], got {share:g}")
        self.suspect_class, self.anomaly_threshold, self.share = suspect_class, anomaly_threshold, share
        self.inversion = inversion or InversionPlan()
        self.inverted: InvertedTriggers | None = None

    # -- the defense contract -------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Copy the model twice: once to be trained, once frozen, to be inverted."""
        super().prepare(model, images, labels)
        self.inverted = None
        self.num_classes = clean_logits(model, images[:2]).shape[1]
        if isinstance(self.suspect_class, int):
            require(
                self.suspect_class < self.num_classes,
                f"defense.suspect_class must be a class in 0..{self.num_classes - 1}, got {self.suspect_class}",
            )
        else:
            require(
                self.num_classes >= 3,
                f"defense.suspect_class={self.suspect_class} looks for a class unlike the others, which needs at least 3 classes, got "
                f"{self.num_classes}: give defense.suspect_class a class",
            )
        self.frozen = [channels_last(frozen_copy(model, images[:1]))]

    @property
    def suspects(self) -> list[int]:
        """The rows of the inverted triggers that are unlearned."""
        assert self.inverted is not None
        if isinstance(self.suspect_class, int):
            return [0]
        return [row for row, index in enumerate(self.indices()) if index > self.anomaly_threshold]

    def indices(self) -> list[float]:
        """The anomaly index of every inverted trigger."""
        assert self.inverted is not None
        found: list[float] = anomaly_indices(self.inverted.sizes).tolist()
        return found

    def findings(self) -> dict[str, Any]:
        """Which classes were suspected, by whom, and how large the inverted masks are."""
        if self.inverted is None:
            return {}
        given = isinstance(self.suspect_class, int)
        found = {
            "suspects": [self.inverted.classes[row] for row in self.suspects],
            "suspected_by": "given" if given else "anomaly index",
            "mask_sizes": dict(zip(map(str, self.inverted.classes), self.inverted.sizes.tolist(), strict=True)),
            "inversion_success": dict(zip(map(str, self.inverted.classes), self.inverted.rates, strict=True)),
            "passes": dict(zip(map(str, self.inverted.classes), self.inverted.passes, strict=True)),
            "left_as_it_was": not self.suspects,
        }
        if not given:
            found["anomaly_indices"] = dict(zip(map(str, self.inverted.classes), self.indices(), strict=True))
        if self.suspect_class == "known":
            found["note"] = "no single target class is known, so the anomaly index decided"
        return found

    def arrays(self) -> dict[str, Tensor]:
        """The triggers as they are used, in float."""
        if self.inverted is None:
            return {}
        return {
            "inverted/masks": self.inverted.masks,
            "inverted/patterns": self.inverted.patterns,
            "inverted/classes": torch.tensor(self.inverted.classes),
        }

    # -- learning -------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Invert the triggers, unless a resumed run brought them."""
        if self.inverted is None:
            classes = [self.suspect_class] if isinstance(self.suspect_class, int) else list(range(self.num_classes))
            with self.trainer.precision_plugin.forward_context():
                self.inverted = invert_triggers(
                    self.frozen[0].to(self.device), self.images, classes, self.inversion, seed=self.seed
                )
        if not self.suspects:
            log.info("no class stands out by its inverted trigger; the model is left as it is")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Without a suspect there is nothing to unlearn."""
        return None if self.suspects else -1

    def on_train_epoch_end(self) -> None:
        if self.suspects:
            super().on_train_epoch_end()

    def augmented(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The trigger on a share of the images, whose labels stay the true ones; then the augmentation."""
        assert self.inverted is not None
        chosen = torch.randperm(len(images), generator=generator)[: max(1, round(self.share * len(images)))]
        rows = torch.tensor(self.suspects)[torch.randint(len(self.suspects), (len(chosen),), generator=generator)]
        chosen, triggered = chosen.to(images.device), images.clone()
        triggered[chosen] = paste(
            images[chosen], self.inverted.masks[rows].to(images.device), self.inverted.patterns[rows].to(images.device)
        )
        return super().augmented(triggered, labels, generator)

    # -- resuming -------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.inverted is not None:
            checkpoint["inverted"] = vars(self.inverted)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "inverted" in checkpoint:
            self.inverted = InvertedTriggers(**checkpoint["inverted"])
