"""Adversarial neuron pruning (Wu and Wang, NeurIPS 2021): neurons that a small change of their weights turns against the network go."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from marginclip.defenses.cross_fitting import stratified_share
from marginclip.defenses.weights.finetune import Augmentation, FineTune
from marginclip.defenses.weights.held_out import last_within
from marginclip.errors import require
from marginclip.networks.copies import own_copy
from marginclip.networks.heads import final_linear
from marginclip.networks.logits import batched_logits

Noise = list[tuple[Tensor, Tensor]]
THRESHOLDS = tuple(step / 20 for step in range(20))  # 0, 0.05, ... 0.95; published: the same steps


class ANP(FineTune):
    """Learns a mask in [0, 1] for every neuron under the worst small change of all neurons, and prunes those of a small mask.

    A neuron is a channel of a batch norm, or, in a network without any, of a convolution or linear layer but the last. With weights
    w and bias b of a neuron, its mask m and changes d, e within ``noise``, each step minimises by m

        alpha CE(f(x; m w, b)) + (1 - alpha) max over d, e of CE(f(x; (m + d) w, (1 + e) b)).

    The change starts at random and takes signed steps. Masks start at 1 and take steps of SGD. Then the weights of neurons with a
    mask below the threshold become 0; all others, biases and batch-norm statistics are the model's own.

    Args:
        steps: SGD steps on the masks.
        noise: largest change of a neuron.
        noise_steps: signed steps of the change.
        alpha: weight of the unchanged network.
        threshold: masks below it are pruned. None: the clean set decides. It is the largest of 0.05, 0.1, ... before the accuracy on a
            held-out part first falls by more than ``max_drop``.
        max_drop: see ``threshold``, as a fraction.
        held_out_share: part of the clean set that is left out of the learning where the clean set decides.
        batch_size: images in a step.
        learning_rate: of SGD.
        momentum: of SGD.
        batch_norm: ``train`` or ``frozen``, as in :class:`FineTune`.
        augmentation: as in :class:`FineTune`.
        seed: of everything that is drawn.
    """

    label = "ANP"
    clean_per_class = 50

    def __init__(
        self,
        *,
        steps: int = 2000,
        noise: float = 0.4,
        noise_steps: int = 1,
        alpha: float = 0.2,
        threshold: float | None = None,
        max_drop: float = 0.02,
        held_out_share: float = 0.2,
        batch_size: int = 128,
        learning_rate: float = 0.2,
        momentum: float = 0.9,
        batch_norm: str = "train",
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, learning_rate=learning_rate, momentum=momentum, weight_decay=0.0, batch_norm=batch_norm,
            augmentation=augmentation, seed=seed,
        )  # fmt: skip
        require(steps >= 1, f"defense.steps must be at least 1, got {steps}")
        require(noise >= 0, f"defense.noise must not be negative, got {noise:g}")
        require(noise_steps >= 1, f"defense.noise_steps must be at least 1, got {noise_steps}")
        for key, value in (("alpha", alpha), ("max_drop", max_drop)):
            require(0 <= value <= 1, f"defense.{key} must be in [0, 1], got {value:g}")
        require(threshold is None or 0 <= threshold <= 1, f"defense.threshold must be null or in [0, 1], got {threshold}")
        require(0 < held_out_share <= 0.5, f"defense.held_out_share must be in (0, 0.5], got {held_out_share:g}")
        self.steps, self.noise, self.noise_steps, self.alpha = steps, noise, noise_steps, alpha
        self.threshold, self.max_drop, self.held_out_share = threshold, max_drop, held_out_share

    # -- the defense contract -------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Copy the model, and keep from the learning what the threshold is to be chosen on."""
        super().prepare(model, images, labels)
        self.layers = neuron_layers(self.network, images)
        self.network.requires_grad_(False)
        self.masks = nn.ParameterList(
            torch.ones(len(layer.weight)).to(layer.weight) for layer in self._modules_of(self.network)
        )
        self.intact = [own_copy(model)]  # in a list: it is no part of what is learned
        self.held_out = self.images[:0], self.labels[:0]
        if self.threshold is None:
            out = stratified_share(labels.cpu(), self.held_out_share, self.seed).to(self.images.device)
            self.held_out = self.images[out], self.labels[out]
            require(
                not bool(out.all()),
                f"ANP has nothing to learn from: defense.held_out_share={self.held_out_share:g} takes at least one clean image of a class, "
                "and no class has more; give more of them, or set defense.threshold",
            )
            self.images, self.labels = self.images[~out], self.labels[~out]

    @property
    def num_epochs(self) -> int:
        return -(-self.steps // self.steps_per_epoch)

    def repaired(self) -> nn.Module:
        """The model's copy without the neurons below the threshold."""
        self.curve = torch.tensor([])
        self.chosen = 0.0 if self.threshold is None else self.threshold
        if self.threshold is None:
            images, labels = self.held_out
            decided = [batched_logits(self._pruned(each), images).argmax(1) for each in THRESHOLDS]
            self.curve = torch.stack([(each.cpu() == labels.cpu()).float().mean() for each in decided])
            self.chosen = THRESHOLDS[last_within(self.curve, self.max_drop)]
        return self._pruned(self.chosen)

    def findings(self) -> dict[str, Any]:
        masks = torch.cat([mask.detach() for mask in self.masks])
        return {"threshold": self.chosen, "neurons": len(masks), "pruned": int((masks < self.chosen).sum())}

    def arrays(self) -> dict[str, Tensor]:
        masks = torch.cat([mask.detach().cpu() for mask in self.masks])
        return {"anp/masks": masks, **({"anp/held_out_accuracy": self.curve} if len(self.curve) else {})}

    # -- learning -------------------------------------------------------------------------------------------------------------

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of the masks as they are, and under the worst change of the neurons."""
        natural = F.cross_entropy(self.masked(images).float(), labels)
        if self.noise == 0:
            return natural
        robust = F.cross_entropy(self.masked(images, self.worst_noise(images, labels)).float(), labels)
        return self.alpha * natural + (1 - self.alpha) * robust

    def on_train_batch_end(self, *_: Any) -> None:
        """Masks stay in [0, 1]."""
        with torch.no_grad():
            for mask in self.masks:
                mask.clamp_(0, 1)

    def masked(self, images: Tensor, noise: Noise | None = None) -> Tensor:
        """The logits of images (N, C, H, W) with the masks, and with a change of the weights and biases of neurons on top."""
        given: dict[str, Tensor] = {}
        for place, (name, layer) in enumerate(zip(self.layers, self._modules_of(self.network), strict=True)):
            factor = self.masks[place] if noise is None else self.masks[place] + noise[place][0]
            given[f"{name}.weight"] = layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1))
            if noise is not None and layer.bias is not None:
                given[f"{name}.bias"] = layer.bias * (1 + noise[place][1])
        logits: Tensor = functional_call(self.network, given, (images,))
        return logits

    def worst_noise(self, images: Tensor, labels: Tensor) -> Noise:
        """A change of every neuron, each entry in [-noise, noise], that raises the loss of images (N, C, H, W), by signed steps."""
        flat = [self._drawn(mask) for mask in self.masks for _ in range(2)]
        for _ in range(self.noise_steps):
            flat = [each.requires_grad_() for each in flat]
            loss = F.cross_entropy(self.masked(images, _pairs(flat)).float(), labels)
            slopes = torch.autograd.grad(loss, flat, allow_unused=True)  # a layer without bias uses one of two
            step = self.noise / self.noise_steps
            moved = [each if slope is None else each + step * slope.sign() for each, slope in zip(flat, slopes, strict=True)]
            flat = [each.detach().clamp(-self.noise, self.noise) for each in moved]
        return _pairs(flat)

    def _drawn(self, mask: Tensor) -> Tensor:
        return ((2 * torch.rand(len(mask)) - 1) * self.noise).to(mask)

    def _modules_of(self, network: nn.Module) -> list[Any]:
        return [network.get_submodule(name) for name in self.layers]

    @torch.no_grad()
    def _pruned(self, threshold: float) -> nn.Module:
        """A copy of the model in which the weights of neurons with a mask below ``threshold`` are 0."""
        network = own_copy(self.intact[0]).requires_grad_(True)
        for mask, layer in zip(self.masks, self._modules_of(network), strict=True):
            layer.weight[(mask < threshold).to(layer.weight.device)] = 0
        return network


def neuron_layers(network: nn.Module, images: Tensor) -> list[str]:
    """The names of the layers whose channels are the neurons to prune.

    Batch norms with weights, or, where there are none, convolutions and linear layers but the final one.
    """
    norms = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
    ]
    if norms:
        return norms
    last, _ = final_linear(network, images, needed_for="which is not to be pruned", instead="defense=finetune or defense=mmac")
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    found = [name for name, module in network.named_modules() if isinstance(module, kinds) and name != last]
    require(bool(found), "adversarial neuron pruning needs a network with a hidden layer; use defense=mmac")
    return found


def _pairs(flat: list[Tensor]) -> Noise:
    return list(zip(flat[::2], flat[1::2], strict=True))
