"""Training the adaptive attacker's victim: defender's bounds and attacker's weights in turn (paper 1, Eq. 5)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.attacks import Adaptive
from marginclip.clipping import Bound, BoundedNetwork
from marginclip.errors import UserError, require
from marginclip.training.poisoned import PoisonedTraining


class AdaptiveTraining(PoisonedTraining):
    """:class:`PoisonedTraining` that starts from a poisoned model and trains it *through* the bounds that the defender would learn.

    At the start of every round the bounds are learned anew for the model as it is. Between, the weights of a bounded copy are
    trained. Batch norm is in training mode: with frozen statistics nothing keeps the activations of the *unbounded* model from
    growing, and it diverged. Where the network is trained without bounds as well, both passes move the same statistics. The model
    takes weights and statistics over after every epoch. The optimizer is SGD with the attack's own learning rate.

    Args:
        model: the poisoned model to start from, which is trained itself: images (B, C, H, W) to logits (B, K).
        attack: must be an :class:`~marginclip.attacks.Adaptive`; it learns the defender's bounds.
        **settings: those of :class:`~marginclip.training.ClassifierTraining`. ``label_smoothing`` alone has an effect; an
            ``optimizer`` must be given all the same.

    Raises:
        UserError: as :class:`~marginclip.training.ClassifierTraining`.
    """

    several_devices = None  # the bounded copy lives with its training alone

    @property
    def attacker(self) -> Adaptive:
        """The attack."""
        assert isinstance(self.attack, Adaptive)
        return self.attack

    def setup(self, stage: str) -> None:
        if hasattr(self, "bounded"):
            return
        self.bounded = BoundedNetwork(self.model.eval(), torch.zeros(1, *self.attacker.image_shape))
        own = set(self.bounded.network.state_dict())
        missing = [name for name, _ in self.model.named_parameters() if name not in own]
        require(
            not missing, f"attack=adaptive cannot train this model through its bounds: '{next(iter(missing), '')}' is not used"
        )
        for parameter in self.bounded.network.parameters():
            parameter.requires_grad_(True)
        for parameter in self.bounded.bound_parameters():
            parameter.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch % self.attacker.epochs_per_round == 0:
            self.bounded.load_bounds(self.attacker.learn_bounds(self.model))
        self.bounded.network.train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with noted_excess(self.bounded, batch["triggered"]) as excess:
            logits = self.bounded(batch["images"])
        data = F.cross_entropy(logits, batch["labels"], label_smoothing=self.label_smoothing)
        penalty = torch.stack(excess).mean() if bool(batch["triggered"].any()) else data.new_zeros(())
        loss = data + self.attacker.beta * penalty
        if self.attacker.unbounded_weight:
            with self.bounded.unbounded():
                logits = self.bounded(batch["images"])
            unbounded = F.cross_entropy(logits, batch["labels"], label_smoothing=self.label_smoothing)
            loss = loss + self.attacker.unbounded_weight * unbounded
        if batch_idx % 50 == 0:
            if not torch.isfinite(loss):
                raise UserError(f"training diverged: the loss is {loss.item()}; try a lower attack.learning_rate")
            self.log_dict({"train/loss": loss, "train/excess": penalty}, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self._take_over()

    def on_validation_start(self) -> None:
        self._take_over()

    def _take_over(self) -> None:
        """Give the trained weights to the model."""
        trained = self.bounded.network.state_dict()
        own = self.model.state_dict()
        self.model.load_state_dict({name: trained.get(name, value) for name, value in own.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        weights = [parameter for parameter in self.bounded.network.parameters() if parameter.requires_grad]
        return torch.optim.SGD(weights, lr=self.attacker.learning_rate, momentum=0.9, weight_decay=5e-4)


@contextmanager
def noted_excess(bounded: BoundedNetwork, chosen: Tensor) -> Iterator[list[Tensor]]:
    """Inside, every pass of ``bounded`` notes for each activation call by how much the ``chosen`` (N,) images' activations
    exceed their bounds before they are cut: the mean of ``relu(phi - z)`` over images and units.
    """
    excess: list[Tensor] = []

    def note(bound: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(bound, Bound)
        values = inputs[0][chosen].float()
        over = F.relu(values - bound.upper.view(bound.view))
        if bound.lower is not None:
            over = over + F.relu(bound.lower.view(bound.view) - values)
        excess.append(over.mean())

    handles = [bound.register_forward_pre_hook(note) for _, bound in bounded.each()]
    try:
        yield excess
    finally:
        for handle in handles:
            handle.remove()
