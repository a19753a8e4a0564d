"""The adaptive attacker of paper 1, section 5.4: a backdoor trained to fit under the bounds that a defender would learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from marginclip.attacks.base import Attack, Augmentation, TrainingAccess
from marginclip.attacks.x2x import X2X
from marginclip.errors import UserError, require

CLEAN_IMAGES = ("defender", "training")


class Adaptive(Attack):
    """Fine-tunes the victim of another attack so that triggered images stay below the defender's bounds (Eq. 5).

    Two steps alternate. (i) Bounds are learned with the defender's own method, weights fixed. (ii) The weights are trained, bounds fixed:
    cross entropy of the bounded network on all training images *and* on a triggered copy of every image that the attack can flip, plus
    ``beta`` times the mean excess of the triggered copies' activations over the bounds. Trigger, rate and timing are those of ``base``.
    As published, nothing in step (ii) sees the network without bounds, which is what the attacker hands over. With ``unbounded_weight``
    above 0 its cross entropy on the same images is added, times this weight: a stronger attacker than the paper's.

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        base: makes the attack whose victim is trained further.
        defender: makes the defender's method.
        beta: weight of the excess over the bounds.
        unbounded_weight: weight of the cross entropy of the network without bounds. 0: as published.
        rounds: how often (i) and (ii) alternate.
        epochs_per_round: epochs of (ii) in a round.
        learning_rate: of (ii).
        max_batches: batches of an epoch at most, for small machines. None: all.
        clean_per_class: clean images of a class that bounds are learned from.
        clean_images: ``defender``, the defender's own, as published; or ``training``, others, which the attacker has.
        seed: of everything that is drawn.

    Raises:
        UserError: for a setting outside its range, and for a ``base`` that controls training itself.
    """

    trained_by = "marginclip.training.AdaptiveTraining"
    uses_clean_set = True

    def __init__(
        self,
        x2x: X2X,
        image_shape: Sequence[int],
        *,
        base: Callable[..., Attack],
        defender: Callable[..., Any],
        beta: float = 1.0,
        unbounded_weight: float = 0.0,
        rounds: int = 10,
        epochs_per_round: int = 2,
        learning_rate: float = 0.01,
        max_batches: int | None = None,
        clean_per_class: int = 50,
        clean_images: str = "defender",
        seed: int = 0,
    ) -> None:
        chosen = base(x2x, image_shape, seed=seed)
        super().__init__(x2x, image_shape, rate=chosen.rate, timing=chosen.timing, min_success=chosen.min_success, seed=seed)
        require(beta >= 0, f"attack.beta must not be negative, got {beta:g}")
        require(unbounded_weight >= 0, f"attack.unbounded_weight must not be negative, got {unbounded_weight:g}")
        require(rounds >= 1, f"attack.rounds must be at least 1, got {rounds}")
        require(epochs_per_round >= 1, f"attack.epochs_per_round must be at least 1, got {epochs_per_round}")
        require(learning_rate > 0, f"attack.learning_rate must be positive, got {learning_rate:g}")
        require(max_batches is None or max_batches >= 1, f"attack.max_batches must be at least 1 or null, got {max_batches}")
        require(clean_per_class >= 1, f"attack.clean_per_class must be at least 1, got {clean_per_class}")
        require(
            clean_images in CLEAN_IMAGES, f"attack.clean_images must be one of {', '.join(CLEAN_IMAGES)}, got '{clean_images}'"
        )
        require(
            chosen.trained_by == Attack.trained_by,
            f"attack.base must be an attack on the training data alone, got {type(chosen).__name__}",
        )
        self.base, self.defender = chosen, defender
        self.beta, self.unbounded_weight = beta, unbounded_weight
        self.rounds, self.epochs_per_round = rounds, epochs_per_round
        self.learning_rate, self.max_batches, self.clean_per_class = learning_rate, max_batches, clean_per_class
        self.clean_images = clean_images
        self._learner: Callable[[nn.Module], dict[str, Tensor]] | None = None

    def trigger(self, images: Tensor) -> Tensor:
        return self.base.trigger(images)

    def poisoned_mask(self, labels: Tensor) -> Tensor:
        """No image is replaced: triggered copies are added to every batch."""
        return torch.zeros(len(labels), dtype=torch.bool)

    def poison_batch(
        self, images: Tensor, labels: Tensor, poisoned: Tensor, augment: Augmentation, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The batch and, behind it, a triggered copy of every image that the attack can flip; ``triggered`` marks the copies."""
        chosen = self.x2x.eligible(labels)
        if self.timing == "after_augmentation":
            images = augment(images, generator)
        both = torch.cat([images, self(images[chosen])])
        if self.timing == "before_augmentation":
            both = augment(both, generator)
        wanted = torch.cat([labels, self.poisoned_labels(labels[chosen])])
        return {"images": both, "labels": wanted, "triggered": torch.arange(len(both), device=both.device) >= len(images)}

    def prepare(self, access: TrainingAccess) -> None:
        """Start from the base attack's victim, and learn how the defender learns."""
        access.load_base_victim(self.base)
        self._learner = access.bound_learner(self.defender, self.clean_per_class, self.clean_images)

    def learn_bounds(self, model: nn.Module) -> dict[str, Tensor]:
        """The bounds that the defender would give to ``model``, as of :meth:`~marginclip.maxmargin.BoundedNetwork.bounds_state`."""
        if self._learner is None:
            raise UserError("an adaptive attack must be prepared before it trains")
        return self._learner(model)

    def training_plan(self, epochs: int) -> dict[str, Any]:
        plan: dict[str, Any] = {"max_epochs": self.rounds * self.epochs_per_round}
        return plan if self.max_batches is None else plan | {"limit_train_batches": self.max_batches}
