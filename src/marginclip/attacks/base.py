"""What every poisoning attack has in common: whom it poisons, how many, when, and the rounding to 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn

from marginclip.attacks.x2x import X2X
from marginclip.errors import require
from marginclip.identity import Identifies

TIMINGS = ("before_augmentation", "after_augmentation")


def round_to_8_bits(images: Tensor) -> Tensor:
    """Images clipped to [0, 1] and rounded to multiples of 1/255, as stored images are."""
    return (images.clamp(0, 1) * 255).round() / 255


Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class TrainingAccess(Protocol):
    """What an attacker who controls training can use: made by whoever trains the victim."""

    def training_images(self, index: Tensor) -> Tensor:
        """Stored training images (B, C, H, W) in [0, 1] by index (B,)."""

    def replace_training_images(self, index: Tensor, images: Tensor) -> None:
        """Train on ``images`` (B, C, H, W) in [0, 1], rounded to 8 bits, in the place of the stored ones."""

    def training_labels(self) -> Tensor:
        """True labels (N,) of the training images."""

    def robust_surrogate(self, settings: Any) -> nn.Module:
        """An adversarially trained model of the victim's architecture, in evaluation mode; trained once and cached."""

    def load_base_victim(self, base: Attack) -> None:
        """Let training start from the victim of the attack that is configured as ``attack.base``, and give ``base`` its trigger."""

    def bound_learner(self, defender: Any, clean_per_class: int, images: str) -> Callable[[nn.Module], dict[str, Tensor]]:
        """What learns bounds for a model as ``defender()`` does, on the clean set of the ``defender`` or on ``training`` images."""


class Attack(nn.Module):
    """A trigger, the images it poisons and the label it gives them. A subclass writes :meth:`trigger`.

    State (patterns) lives in buffers: an attack travels with its victim through ``state_dict``. ``has_cross_triggers`` says whether images
    have triggers of their own. ``uses_clean_set`` says whether the attacker knows the defender's clean set; then the victim depends on it.

    An attacker who controls training overrides :meth:`prepare` (before it), :meth:`poison_batch` (in every batch) or names another
    LightningModule in ``trained_by``.

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        rate: share of every *eligible* class that is poisoned (papers: 10 %, 500 of a CIFAR-10 class).
        timing: ``before_augmentation`` puts the trigger on the stored image, so that crop and flip move it too; ``after_augmentation`` puts
            it on the augmented image.
        min_success: attack success rate under which the attack counts as failed (see :meth:`needed_success`).
        seed: of everything that is drawn.

    Raises:
        UserError: for a setting outside its range.
    """

    trained_by = "marginclip.training.PoisonedTraining"
    has_cross_triggers = False
    uses_clean_set = False

    def __init__(
        self,
        x2x: X2X,
        image_shape: Sequence[int],
        *,
        rate: float = 0.1,
        timing: str = "before_augmentation",
        min_success: Annotated[float, Identifies.RUN] = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__()
        hint = f"; did you mean {rate / 100:g}?" if 1 < rate <= 100 else ""
        require(0 < rate <= 1, f"attack.rate must be in (0, 1], got {rate:g}{hint}")
        require(timing in TIMINGS, f"attack.timing must be one of {', '.join(TIMINGS)}, got '{timing}'")
        require(0 <= min_success <= 1, f"attack.min_success must be in [0, 1], got {min_success:g}")
        self.x2x, self.rate, self.timing, self.min_success, self.seed = x2x, rate, timing, min_success, seed
        self.image_shape = tuple(image_shape)

    def trigger(self, images: Tensor) -> Tensor:
        """New images (N, C, H, W) that carry the trigger, before clipping and rounding; the input is left as it is."""
        raise TypeError(f"{type(self).__name__} does not say how its trigger is embedded")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W) in [0, 1], clipped and rounded to 8 bits; at training and at test alike."""
        return round_to_8_bits(self.trigger(images))

    def cross_triggered(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) with the trigger of another image, which should not flip them; where ``has_cross_triggers``."""
        raise TypeError(f"{type(self).__name__} has one trigger for all images")

    def poisoned_mask(self, labels: Tensor) -> Tensor:
        """Which training images (by label, (N,)) are poisoned: ``round(rate * count)``, at least one, of every eligible class."""
        return self._share_of(labels, labels[self.x2x.eligible(labels)].unique())

    def target_mask(self, labels: Tensor) -> Tensor:
        """The same share of the target class alone, for attacks that change no label."""
        return self._share_of(labels, labels[self.x2x.flipped(labels).eq(labels)].unique())

    def _share_of(self, labels: Tensor, classes: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 104729)
        mask = torch.zeros(len(labels), dtype=torch.bool)
        for label in classes:
            members = (labels == label).nonzero().flatten()
            count = max(1, round(self.rate * len(members)))
            mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
        return mask

    def needed_success(self, accuracy: float) -> float:
        """The attack success rate from which on the attack counts as taken, for a victim of this clean accuracy (both fractions).

        ``min_success``, or that share of the accuracy where the attack must recognise the true class first (all2all).
        """
        return self.min_success * (accuracy if self.x2x.recognises_source else 1.0)

    def poisoned_labels(self, labels: Tensor) -> Tensor:
        """Labels that poisoned images of the true ``labels`` (N,) get in training."""
        return self.x2x.flipped(labels)

    def poison_batch(
        self, images: Tensor, labels: Tensor, poisoned: Tensor, augment: Augmentation, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A training batch: stored images (B, C, H, W), their true labels and :meth:`poisoned_mask` (B,) in, augmented ``images``
        and the ``labels`` to learn out. ``generator`` is the only source of randomness.
        """
        labels = torch.where(poisoned, self.poisoned_labels(labels), labels)
        if self.timing == "after_augmentation":
            images = augment(images, generator)
        # All are triggered and some are taken: to pick them first, the program would have to wait for the GPU.
        images = torch.where(poisoned.view(-1, 1, 1, 1), self(images), images)
        if self.timing == "before_augmentation":
            images = augment(images, generator)
        return {"images": images, "labels": labels}

    def prepare(self, access: TrainingAccess) -> None:
        """What the attacker does before the victim is trained; nothing here."""

    def training_plan(self, epochs: int) -> dict[str, Any]:
        """Settings of the Trainer for a victim that is trained for ``epochs`` epochs."""
        return {"max_epochs": epochs}
