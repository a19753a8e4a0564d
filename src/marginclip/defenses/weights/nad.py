"""Neural attention distillation (Li et al., ICLR 2021): a fine-tuned copy shows the attacked model where to look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from marginclip.clipping.activations import find_sites
from marginclip.defenses.base import Variant
from marginclip.defenses.weights.finetune import FineTune, set_training
from marginclip.errors import UserError, require
from marginclip.networks.copies import trainable_copy
from marginclip.networks.tracing import trace


class NAD(FineTune):
    """Fine-tunes a teacher, then a student, both copies of the model, the student with the teacher's attention as a guide.

    The student's loss is the cross entropy plus, for each tap, its weight in ``betas`` times :func:`attention_distance` to the teacher. The
    teacher is frozen in evaluation mode by then. Taps are the last activation at each image resolution inside the network; ``betas``
    are those of the last resolutions, so a ResNet-18 is tapped behind its stages 2, 3 and 4. The teacher is the row ``nad_teacher``.

    Args:
        betas: weights of the taps. A network of fewer resolutions takes the last of them.
        beta_pixels: pixels of the published network's maps. The distance is a mean over pixels, so a map of fewer pixels than that
            for which a beta was published would weigh more; with them the *sum* over pixels weighs the same. None: betas as they are.
        teacher_epochs: epochs of the teacher.
        teacher_learning_rate: of the teacher, at the start.
        teacher_decay_every: epochs until the teacher's rate falls to a tenth.
        teacher_decays: how often it falls at most.
        epochs: epochs of the student.
        learning_rate: of the student.
        high_epochs: epochs at that rate; then a tenth.
        batch_size: images in a step, of teacher and student.
        nesterov: Nesterov's momentum.
        weight_decay: of SGD.
        **settings: those of :class:`FineTune`.
    """

    label = "NAD"
    clean_per_class = 200

    def __init__(
        self,
        *,
        betas: Sequence[float] = (500.0, 1000.0, 1000.0),
        beta_pixels: Sequence[int] | None = (1024, 256, 64),
        teacher_epochs: int = 10,
        teacher_learning_rate: float = 0.1,
        teacher_decay_every: int = 2,
        teacher_decays: int = 1,
        epochs: int = 20,
        learning_rate: float = 0.01,
        high_epochs: int = 20,
        batch_size: int = 64,
        nesterov: bool = True,
        weight_decay: float = 1e-4,
        **settings: Any,
    ) -> None:
        own: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
        super().__init__(**own, nesterov=nesterov, weight_decay=weight_decay, **settings)
        require(len(betas) >= 1 and min(betas) >= 0, f"defense.betas must be weights from 0 up, got {list(betas)}")
        require(
            beta_pixels is None or (len(beta_pixels) >= len(betas) and min(beta_pixels) >= 1),
            f"defense.beta_pixels must be null or a count of pixels for each of defense.betas, got {beta_pixels}",
        )
        require(teacher_decays >= 0, f"defense.teacher_decays must not be negative, got {teacher_decays}")
        require(teacher_epochs >= 1, f"defense.teacher_epochs must be at least 1, got {teacher_epochs}")
        require(teacher_learning_rate > 0, f"defense.teacher_learning_rate must be positive, got {teacher_learning_rate:g}")
        require(teacher_decay_every >= 1, f"defense.teacher_decay_every must be at least 1, got {teacher_decay_every}")
        require(high_epochs >= 0, f"defense.high_epochs must not be negative, got {high_epochs}")
        self.betas, self.teacher_epochs, self.high_epochs = tuple(betas), teacher_epochs, high_epochs
        self.beta_pixels = None if beta_pixels is None else tuple(beta_pixels)
        self.teacher_learning_rate, self.teacher_decay_every = teacher_learning_rate, teacher_decay_every
        self.teacher_decays = teacher_decays

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().prepare(model, images, labels)
        self.teacher = trainable_copy(model).eval()
        traced = trace(model)
        self.taps = attention_taps(traced, images[:2])[-len(self.betas) :]
        self.tapped = [TappedNetwork(network, traced, self.taps) for network in (self.network, self.teacher)]

    @property
    def num_epochs(self) -> int:
        return self.teacher_epochs + self.epochs

    def rate(self, epoch: int) -> float:
        if epoch < self.teacher_epochs:
            return self.teacher_learning_rate * 0.1 ** min(epoch // self.teacher_decay_every, self.teacher_decays)
        return self.learning_rate * (1.0 if epoch - self.teacher_epochs < self.high_epochs else 0.1)

    def before_epoch(self, epoch: int) -> None:
        learner, other = (self.teacher, self.network) if epoch < self.teacher_epochs else (self.network, self.teacher)
        set_training(learner, batch_norm=self.batch_norm)
        other.eval()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Only the network that learns gets a gradient; the optimizer leaves the other as it is, velocity and weight decay included."""
        if self.current_epoch < self.teacher_epochs:
            return F.cross_entropy(self.teacher(images).float(), labels)
        student, teacher = self.tapped
        with torch.no_grad():
            _, wanted = teacher(images)
        logits, found = student(images)
        pairs = zip(self._weights(found), found, wanted, strict=True)
        guide = torch.stack([beta * attention_distance(one, other) for beta, one, other in pairs]).sum()
        return F.cross_entropy(logits.float(), labels) + guide

    def _weights(self, maps: Sequence[Tensor]) -> list[float]:
        """The weight of each tap's distance, given its feature maps (B, C, H, W)."""
        betas = self.betas[-len(maps) :]
        if self.beta_pixels is None:
            return list(betas)
        sizes = zip(betas, maps, self.beta_pixels[-len(maps) :], strict=True)
        return [beta * features.shape[2:].numel() / pixels for beta, features, pixels in sizes]

    def variants(self) -> dict[str, Variant]:
        return {"nad_teacher": Variant("NAD, teacher", self.teacher.eval())}

    def findings(self) -> dict[str, Any]:
        return {"taps": list(self.taps)}


def attention_map(features: Tensor) -> Tensor:
    """Where the channels are strong: the sum over channels of squares, of unit length for each image.

    ``features`` (B, C, H, W); returns (B, H * W). All-zero features give zeros.
    """
    energy = features.float().square().sum(1).flatten(1)
    length: Tensor = energy.norm(dim=1, keepdim=True)
    return energy / (length + 1e-6)


def attention_distance(features: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared difference of two networks' attention maps of the same images (B, C, H, W)."""
    return F.mse_loss(attention_map(features), attention_map(wanted))


def attention_taps(traced: fx.GraphModule, example: Tensor) -> list[str]:
    """The last activation call at each resolution (H, W) of feature maps, by graph node name, in the order of execution.

    ``example`` (1, C, H, W). Raises :class:`UserError` for a network without feature maps.
    """
    example = example.to(next(traced.parameters(), example).device)
    maps = [site for site in find_sites(traced, example) if site.num_axes == 4 and site.axis == 1]
    last = {site.size: site.node.name for site in maps}
    if not last:
        raise UserError("attention distillation needs activations with feature maps (N, C, H, W); use defense=finetune")
    return [site.node.name for site in maps if site.node.name in last.values()]


class TappedNetwork(fx.Interpreter):
    """Runs ``network`` along the graph of its traced copy and gives its logits and the values of the calls ``taps``.

    It has no weights of its own: it runs the modules of ``network``, in the modes that they are in. What a forward method does
    with ``self.training`` was fixed to evaluation when it was traced.
    """

    def __init__(self, network: nn.Module, traced: fx.GraphModule, taps: Sequence[str]) -> None:
        super().__init__(network, graph=traced.graph)
        self.traced, self.taps, self.values = traced, tuple(taps), dict[str, Tensor]()

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.device = images.device
        self.values.clear()
        logits = self.run(images)
        return logits, [self.values.pop(name) for name in self.taps]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.taps:
            self.values[n.name] = value
        return value

    def fetch_attr(self, target: str) -> Any:
        """Tensors that a forward method writes out are constants of the traced copy, on the device where it was traced."""
        if hasattr(self.module, target.split(".")[0]):
            return super().fetch_attr(target)
        return getattr(self.traced, target).to(self.device)
