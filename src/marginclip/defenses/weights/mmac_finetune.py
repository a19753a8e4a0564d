"""MMAC, then a short fine-tuning of the bounded network: what bounds cannot reach is unlearned (paper 1, end of section 5.7)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses.base import RepairResult, TrainerFactory, Variant
from marginclip.defenses.clipping.mmac import MMAC
from marginclip.defenses.clipping.settings import AscentPlan
from marginclip.defenses.weights.finetune import FineTune
from marginclip.errors import UserError, require
from marginclip.maxmargin.margin import ascend_margins
from marginclip.maxmargin.objectives import kl_divergence
from marginclip.networks.logits import clean_logits
from marginclip.silence import nested_trainers, silent_trainer


class MMACFineTune(FineTune):
    """Learns bounds with MMAC, then fine-tunes the weights below them. **It changes weights**, unlike MMAC itself.

    Each step takes clean images with their labels, and margin inputs: clean images of other classes that ``ascent`` moves towards
    each class on the network as it is. They keep the label of the class that they came from. So the network unlearns that a small
    change can turn an image into another class. A few hundred images are soon known by heart, so mixtures of two clean images (Zhang et
    al. 2018) hold the network to what it was before: on these it is to give the class probabilities of the bounded network. Adam takes
    the steps, its rate falls to zero along a cosine, and batch norms keep the model's statistics. The bounded network before the
    fine-tuning is the row ``mmac``.

    Args:
        mmac: makes the bound learning that comes first; it is called with a ``seed``. None leaves the activations unbounded.
        ascent: how margin inputs are made, anew at every step. None: its defaults with ``refresh_every=1``. Inputs that are kept, a
            part of them, and the network without bounds are not for this method.
        margin_weight: weight of the margin inputs' cross entropy against that of the clean images.
        mixture_weight: weight of the divergence from the bounded network on the mixtures, as many as clean images. 0: none.
        epochs: passes over the clean set.
        batch_size: clean images in a step.
        learning_rate: of Adam.
        weight_decay: of Adam.
        augmentation: as in :class:`FineTune`.
        seed: of everything that is drawn.
    """

    label = "MMAC + fine-tuning"
    bounds_activations = True
    clean_per_class = 50

    def __init__(
        self,
        *,
        mmac: Callable[..., MMAC] | None = MMAC,
        ascent: AscentPlan | None = None,
        margin_weight: float = 0.3,
        mixture_weight: float = 1.0,
        epochs: int = 12,
        batch_size: int = 100,
        learning_rate: float = 3e-4,
        weight_decay: float = 5e-4,
        augmentation: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, weight_decay=weight_decay, batch_norm="frozen",
            augmentation=augmentation, seed=seed,
        )  # fmt: skip
        require(margin_weight >= 0, f"defense.margin_weight must not be negative, got {margin_weight:g}")
        require(mixture_weight >= 0, f"defense.mixture_weight must not be negative, got {mixture_weight:g}")
        self.margin_weight, self.mixture_weight = margin_weight, mixture_weight
        self.ascent = ascent or AscentPlan(refresh_every=1)
        self._check_ascent()
        try:
            self.bound_learning = None if mmac is None else copy.deepcopy(mmac)(seed=seed)
        except UserError as error:
            raise UserError(str(error).replace("defense.", "defense.mmac.")) from error
        self.bounded: RepairResult | None = None

    def _check_ascent(self) -> None:
        """Raise :class:`UserError` for a plan that this method cannot follow."""
        require(
            self.ascent.start_from == "clean",
            f"defense.ascent.start_from must be clean: margin inputs keep the label of the image that they come from; got "
            f"{self.ascent.start_from}",
        )
        for key, only in (("network", "bounded"), ("refresh_every", 1), ("warm_start", False), ("batch_size", None)):
            shown = {None: "null", False: "false"}.get(only, only)  # type: ignore[arg-type]
            require(
                getattr(self.ascent, key) == only,
                f"defense.ascent.{key} must be {shown}: every step ascends all margin inputs anew, on the network as it is; got "
                f"{getattr(self.ascent, key)}",
            )

    # -- the defense contract -------------------------------------------------------------------------------------------------

    def in_proportion(self, share: float, fewest: int | None = None) -> AbstractContextManager[None]:
        """See :meth:`Defense.in_proportion`: of the bound learning."""
        return nullcontext() if self.bound_learning is None else self.bound_learning.in_proportion(share, fewest)

    def check_model(self, model: nn.Module, image: Tensor) -> None:
        """Whether its activations can be bounded."""
        if self.bound_learning is not None:
            self.bound_learning.check_model(model, image)

    def fit(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        make_trainer: TrainerFactory = silent_trainer,
        resume: Path | None = None,
    ) -> RepairResult:
        """See :meth:`Defense.fit`. The fine-tuning alone can be resumed: bounds are learned again, to the same values."""
        self.bounded = None
        if self.bound_learning is not None:
            nested = nested_trainers(make_trainer(1))
            self.bounded = self.bound_learning.fit(model, images, labels, make_trainer=nested)
        return super().fit(model, images, labels, make_trainer=make_trainer, resume=resume)

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().prepare(model, images, labels)
        if self.bounded is not None:
            self.network = copy.deepcopy(self.bounded.network).to(images.device)
        self.num_classes = clean_logits(self.network, self.images[:1]).shape[1]
        self.before = [copy.deepcopy(self.network).eval().requires_grad_(False)]  # in a list: it is no part of what is learned
        self.network.requires_grad_(True)
        if isinstance(self.network, BoundedNetwork):
            for bound in self.network.bound_parameters():
                bound.requires_grad_(False)

    def variants(self) -> dict[str, Variant]:
        """The bounded network before its weights were changed."""
        return {} if self.bounded is None else {"mmac": Variant(MMAC.label, self.bounded.network)}

    def findings(self) -> dict[str, Any]:
        return {} if self.bounded is None else {"mmac": self.bounded.findings}

    # -- learning -------------------------------------------------------------------------------------------------------------

    def before_epoch(self, epoch: int) -> None:
        """Batch norm keeps the model's statistics, and nothing is dropped."""
        del epoch
        self.network.eval()

    def configure_optimizers(self) -> Any:
        weights = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(weights, self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.epochs * self.steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """The optimizer's rate follows its schedule, not :meth:`rate`."""
        self.before_epoch(self.current_epoch)
        self.totals.clear()

    def on_fit_start(self) -> None:
        self.before[0].to(self.device)

    def augmented(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clean images, then their mixtures, then the margin inputs of this step; and the labels of the first and of the last.

        The label of a margin input is that of the image that it comes from.
        """
        clean, labels = super().augmented(images, labels, generator)
        parts, answers = [clean], [labels]
        if self.mixture_weight:
            share = torch.rand(len(clean), 1, 1, 1, generator=generator).to(clean)
            others = torch.randperm(len(clean), generator=generator).to(clean.device)
            parts.append(share * clean + (1 - share) * clean[others])
        if self.margin_weight:
            wanted = self.ascent.classes(self.num_classes, refresh=self.global_step, seed=self.seed).to(labels.device)
            rows = self.ascent.start_rows(self.labels, wanted, generator)
            starts, origins = super().augmented(self.images[rows], self.labels[rows], generator)
            moved = ascend_margins(self.network, wanted, starts, **self.ascent.search(first=self.global_step == 0)).images
            parts.append(moved.to(clean))
            answers.append(origins)
        return torch.cat(parts), torch.cat(answers)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        inputs = len(self.ascent.classes(self.num_classes)) if self.margin_weight else 0
        clean, mixtures = len(labels) - inputs, len(images) - len(labels)
        logits, mixed, moved = self.network(images).float().split([clean, mixtures, inputs])
        loss = F.cross_entropy(logits, labels[:clean])
        if mixtures:
            with torch.no_grad():
                targets = self.before[0](images[clean : clean + mixtures])
            loss = loss + self.mixture_weight * kl_divergence(mixed, targets)
        return loss if inputs == 0 else loss + self.margin_weight * F.cross_entropy(moved, labels[clean:])
