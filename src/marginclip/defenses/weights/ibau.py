"""I-BAU: unlearning the worst perturbation by a minimax game with an implicit hypergradient (Zeng et al., ICLR 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from marginclip.defenses.base import History, LearningDefense
from marginclip.errors import require
from marginclip.networks.copies import trainable_copy
from marginclip.networks.logits import check_clean_set, clean_logits


def fixed_point_hypergradient(
    inner: Callable[[Tensor], Tensor],
    outer: Callable[[Tensor], Tensor],
    delta: Tensor,
    parameters: Sequence[Tensor],
    *,
    iterations: int = 5,
    step_size: float = 0.1,
) -> list[Tensor]:
    """The gradient by ``parameters`` of ``outer(delta*)``, where delta* minimises ``inner``, at delta near delta*.

    ``inner`` and ``outer`` map the perturbation to a scalar and depend on the parameters too; ``inner`` must be differentiable
    twice. With Phi(d) = d - step_size * d inner/dd, whose fixed point is delta*, the implicit-function theorem gives

        d outer/d theta + (d Phi/d theta)^T v,     v = (d Phi/dd)^T v + d outer/dd,

    where v is the result of ``iterations`` fixed-point iterations from 0. None (0) leaves the plain outer gradient. They converge
    where the eigenvalues of ``inner``'s Hessian lie in (0, 2 / step_size).
    """
    delta = delta.detach().requires_grad_()
    value = outer(delta)
    direct = torch.autograd.grad(value, [delta, *parameters], allow_unused=True)
    totals = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, direct[1:], strict=True)]
    if iterations == 0 or direct[0] is None:
        return totals
    (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    mapped = delta - step_size * slope
    v = torch.zeros_like(delta)
    for _ in range(iterations):
        (turned,) = torch.autograd.grad(mapped, delta, v, retain_graph=True)
        v = turned + direct[0]
    implicit = torch.autograd.grad(mapped, list(parameters), v, allow_unused=True)
    return [total if part is None else total + part for total, part in zip(totals, implicit, strict=True)]


class IBAU(LearningDefense):
    """I-BAU: ``rounds`` times, find one perturbation that misleads the network on the clean set, then unlearn it.

    Inner problem, one pass over the clean set: SGD on -CE(f(x + delta), argmax f(x)) + ``penalty`` ||delta||^2. delta starts at 0 and is
    projected to the L2 ball of ``radius``. Outer problem, another pass: Adam on CE(f(x'), y), x' the batch with delta on ``share`` of
    it, by the hypergradient of :func:`fixed_point_hypergradient`; the inner loss there is that of the first batch with the true
    labels, as in the authors' code. Batch norm keeps the model's statistics. Everything is computed in full precision, whatever the
    Trainer's, as the second derivatives need it.

    Args:
        rounds: of both problems.
        batch_size: images in a step.
        inner_rate: of the inner SGD.
        penalty: weight of ||delta||^2.
        radius: of the L2 ball.
        learning_rate: of Adam.
        share: part of a batch that carries delta; at least one image.
        iterations: of the hypergradient.
        inner_step: step of the hypergradient's fixed point.
        seed: of the order of the images.
    """

    label = "I-BAU"
    bounds_activations = False
    clean_per_class = 100
    images: Tensor
    labels: Tensor
    delta: Tensor

    def __init__(
        self,
        *,
        rounds: int = 5,
        batch_size: int = 100,
        inner_rate: float = 10.0,
        penalty: float = 0.001,
        radius: float = 10.0,
        learning_rate: float = 3e-4,
        share: float = 0.01,
        iterations: int = 5,
        inner_step: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in (("rounds", rounds), ("batch_size", batch_size)):
            require(value >= 1, f"defense.{key} must be at least 1, got {value}")
        for key, rate in (
            ("inner_rate", inner_rate),
            ("learning_rate", learning_rate),
            ("inner_step", inner_step),
            ("radius", radius),
        ):
            require(rate > 0, f"defense.{key} must be positive, got {rate:g}")
        require(penalty >= 0, f"defense.penalty must not be negative, got {penalty:g}")
        require(0 < share <= 1, f"defense.share must be in (0, 1], got {share:g}")
        require(iterations >= 0, f"defense.iterations must not be negative, got {iterations}")
        self.rounds, self.batch_size, self.inner_rate, self.penalty, self.radius = (
            rounds,
            batch_size,
            inner_rate,
            penalty,
            radius,
        )
        self.learning_rate, self.share, self.iterations, self.inner_step = learning_rate, share, iterations, inner_step
        self.seed = seed
        self.history: History = []
        self.automatic_optimization = False

    # -- the defense contract -------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Copy the model and keep the clean set."""
        self.history = []
        check_clean_set(images, labels, clean_logits(model, images).shape[1])
        # Double backward of convolutions is faster in the plain layout, unlike all else here.
        self.network = trainable_copy(model).to(memory_format=torch.contiguous_format).eval()
        self.register_buffer("images", images.clone(memory_format=torch.contiguous_format), persistent=False)
        self.register_buffer("labels", labels.clone().to(images.device), persistent=False)
        self.register_buffer("delta", torch.zeros_like(images[:1]))
        self.totals: list[Tensor] = []

    def batches(self) -> DataLoader[int]:
        """One round: the batches of the outer pass; which images a batch holds follows from its number."""
        return DataLoader(range(self.steps_per_round), batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]

    @property
    def num_epochs(self) -> int:
        return self.rounds

    @property
    def steps_per_round(self) -> int:
        """Batches in one pass over the clean set."""
        return -(-len(self.images) // self.batch_size)

    def repaired(self) -> nn.Module:
        """The unlearned network."""
        return self.network.eval()

    def findings(self) -> dict[str, Any]:
        return {"perturbation_norm": float(self.delta.norm())}

    def arrays(self) -> dict[str, Tensor]:
        return {"ibau/perturbation": self.delta[0]}

    # -- learning -------------------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> IBAU:
        """The network stays in evaluation mode: batch norm keeps the model's statistics."""
        super().train(mode)
        if "network" in self._modules:
            self.network.eval()
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), self.learning_rate)

    def on_train_epoch_start(self) -> None:
        self.network.eval()
        self.totals.clear()
        with torch.autocast(self.device.type, enabled=False):
            self._find_perturbation()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One outer step, by the hypergradient."""
        optimizer = self.optimizers()
        rows, carriers = self._rows(batch_idx), self._carriers(self.current_epoch, batch_idx)
        first = self._rows(0)
        parameters = list(self.network.parameters())

        def inner(delta: Tensor) -> Tensor:
            loss = F.cross_entropy(self.network(self.images[first] + delta), self.labels[first])
            return -loss + self.penalty * delta.square().sum()

        def outer(delta: Tensor) -> Tensor:
            loss = F.cross_entropy(self.network(self.images[rows] + carriers * delta), self.labels[rows])
            self.totals.append(loss.detach())
            return loss

        with torch.autocast(self.device.type, enabled=False):
            gradients = fixed_point_hypergradient(
                inner, outer, self.delta, parameters, iterations=self.iterations, step_size=self.inner_step
            )
        # The loss whose gradients these are: in fp16 Lightning scales it, and the gradients back before the step.
        pairs = zip(parameters, gradients, strict=True)
        self.manual_backward(torch.stack([(parameter * gradient).sum() for parameter, gradient in pairs]).sum())
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.log("defense/loss", self.totals[-1], prog_bar=True, batch_size=len(rows))

    def on_train_epoch_end(self) -> None:
        mean = float(torch.stack(self.totals).mean())
        require(math.isfinite(mean), f"I-BAU diverged: the loss is {mean}; try a lower defense.learning_rate")
        self.history.append({"loss": mean, "perturbation_norm": float(self.delta.norm())})

    def _find_perturbation(self) -> None:
        """One pass of SGD from 0 towards the perturbation that changes the most decisions."""
        delta = torch.zeros_like(self.delta)
        for index in range(self.steps_per_round):
            images = self.images[self._rows(index)]
            with torch.no_grad():
                decisions = self.network(images).argmax(1)
            delta = delta.detach().requires_grad_()
            loss = self.penalty * delta.square().sum() - F.cross_entropy(self.network(images + delta), decisions)
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = delta.detach() - self.inner_rate * gradient
        self.delta.copy_(delta * min(1.0, self.radius / max(float(delta.norm()), 1e-12)))

    def _rows(self, index: int) -> Tensor:
        """The rows of the clean set of one batch: the same batches in every round, in an order drawn by the seed."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.seed))
        return order.tensor_split(self.steps_per_round)[index].to(self.images.device)

    def _carriers(self, epoch: int, index: int) -> Tensor:
        """Which images of a batch carry the perturbation, as 0 and 1 (B, 1, 1, 1): another choice at each step."""
        count = len(self._rows(index))
        seed = ((self.seed * 1_000_003 + epoch) * 100_003 + 1 + index) % 2**63
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: max(1, int(self.share * count))]
        mask = torch.zeros(count, 1, 1, 1)
        mask[chosen] = 1
        return mask.to(self.images)

    # -- resuming -------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ibau"] = {"history": self.history}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = checkpoint["ibau"]["history"]
