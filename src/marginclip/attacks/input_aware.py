"""The input-aware dynamic trigger: a generator paints another trigger on every image (Nguyen and Tran, NeurIPS 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginclip.attacks.base import Attack, Augmentation, round_to_8_bits
from marginclip.attacks.wanet import batch_shares
from marginclip.attacks.x2x import X2X
from marginclip.errors import require


class EncoderDecoder(nn.Module):
    """Images (N, C, H, W) to maps (N, out_channels, H, W) in (0, 1): three halvings of 1, 2 and 4 ``width`` channels and back."""

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(
            nn.Sequential(*_layer(before, after), *_layer(after, after))
            for before, after in zip((in_channels, *widths), widths, strict=False)
        )
        self.middle = nn.Sequential(*_layer(widths[-1], widths[-1]))
        self.up = nn.ModuleList(
            nn.Sequential(*_layer(before, before), *_layer(before, after))
            for before, after in ((widths[2], widths[1]), (widths[1], widths[0]))
        )
        self.last = nn.Sequential(*_layer(widths[0], widths[0]), nn.Conv2d(widths[0], out_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        sizes = []
        for block in self.down:
            images = block(images)
            sizes.append(images.shape[2:])
            images = F.max_pool2d(images, 2)
        images = self.middle(images)
        for block, size in zip((*self.up, self.last), reversed(sizes), strict=True):
            images = block(F.interpolate(images, size=size, mode="bilinear", align_corners=False))
        return images.float().tanh() / 2 + 0.5


def _layer(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after, momentum=0.05), nn.ReLU(inplace=True)


class InputAware(Attack):
    """``x + (pattern(x) - x) * mask(x)``, pattern and mask by two networks of the image itself.

    The mask network is trained first, to cover little of the image and to differ between images. Then it is frozen, and generator and
    classifier are trained together. In every batch the first ``int(rate * B)`` images carry their own trigger and the attacker's label; the
    next ones carry the trigger of *another* image and their true label. Images are rounded to 8 bits in training too, with a
    straight-through gradient.

    Args:
        x2x: whom the attack flips, and to what.
        image_shape: (C, H, W).
        cross_ratio: images with another image's trigger, for each poisoned one.
        density: share of the image that a mask may cover freely.
        density_weight: weight of what a mask covers beyond.
        diversity: weight of the diversity loss.
        mask_epochs: epochs of the mask network.
        width: channels at the first level of both networks (published: 32).
        learning_rate: of both networks.
        seed: of everything that is drawn.
        **settings: those of :class:`~marginclip.attacks.Attack`: ``rate``, ``timing`` and ``min_success``.
    """

    trained_by = "marginclip.training.JointTraining"
    has_cross_triggers = True

    def __init__(
        self,
        x2x: X2X,
        image_shape: Sequence[int],
        *,
        cross_ratio: float = 1.0,
        density: float = 0.032,
        density_weight: float = 100.0,
        diversity: float = 1.0,
        mask_epochs: int = 25,
        width: int = 32,
        learning_rate: float = 0.01,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(x2x, image_shape, seed=seed, **settings)
        channels, height, width_px = self.image_shape
        require(min(height, width_px) >= 8, f"attack=input_aware needs images of at least 8 x 8, got {height} x {width_px}")
        require(cross_ratio >= 0, f"attack.cross_ratio must not be negative, got {cross_ratio:g}")
        require(0 < density < 1, f"attack.density must be in (0, 1), got {density:g}")
        require(mask_epochs >= 1, f"attack.mask_epochs must be at least 1, got {mask_epochs}")
        require(width >= 1, f"attack.width must be at least 1, got {width}")
        require(learning_rate > 0, f"attack.learning_rate must be positive, got {learning_rate:g}")
        require(
            self.timing == "after_augmentation",
            "attack=input_aware paints on the augmented image: attack.timing must be after_augmentation",
        )
        self.cross_ratio, self.density, self.density_weight = cross_ratio, density, density_weight
        self.diversity, self.mask_epochs, self.learning_rate = diversity, mask_epochs, learning_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = EncoderDecoder(channels, channels, width)
            self.masker = EncoderDecoder(channels, 1, width)
        self.eval()

    def pattern(self, images: Tensor) -> Tensor:
        """The trigger's colours (N, C, H, W) in (0, 1) for images (N, C, H, W)."""
        colours: Tensor = self.generator(images)
        return colours

    def mask(self, images: Tensor) -> Tensor:
        """The share of the trigger in every pixel, (N, 1, H, W) in (0, 1): nearly binary."""
        mask: Tensor = self.masker(images)
        return (20 * mask - 10).tanh() / 2 + 0.5

    def trigger(self, images: Tensor) -> Tensor:
        return _paint(images, self.pattern(images), self.mask(images))

    @torch.no_grad()
    def cross_triggered(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) with the trigger of the image before each in the batch, rounded to 8 bits."""
        others = images.roll(1, 0)
        return round_to_8_bits(_paint(images, self.pattern(others), self.mask(others)))

    def poisoned_mask(self, labels: Tensor) -> Tensor:
        """No image is poisoned before training: each batch has its own."""
        return torch.zeros(len(labels), dtype=torch.bool)

    def poison_batch(
        self, images: Tensor, labels: Tensor, poisoned: Tensor, augment: Augmentation, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The augmented batch with its true labels: triggers are painted where the generator is trained, in :meth:`joint_batch`."""
        return {"images": augment(images, generator), "labels": labels}

    def training_plan(self, epochs: int) -> dict[str, Any]:
        return {"max_epochs": self.mask_epochs + epochs}

    def mask_loss(self, images: Tensor) -> Tensor:
        """What the mask network minimises: too dense a mask, and masks that are alike where images are not."""
        masks = self.mask(images)
        excess = F.relu(masks - self.density).mean()
        return self.density_weight * excess + diversity_loss(images, images.roll(1, 0), masks, masks.roll(1, 0))

    def joint_batch(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A batch with triggers and cross triggers painted on, the labels to learn, and the generator's diversity loss."""
        self.masker.eval()  # it is done
        own, crossed = batch_shares(self.x2x, labels, self.rate, self.cross_ratio, generator)
        if len(own) == 0 or len(images) < 2:
            return images, labels, images.new_zeros(())
        pairs = min(len(own), len(crossed))
        others = (crossed - 1) % len(images)
        if len(images) > 2:  # an image and itself say nothing of how their triggers differ
            others[:pairs] = torch.where(others[:pairs] == own[:pairs], (others[:pairs] - 1) % len(images), others[:pairs])
        sources = torch.cat([images[own], images[others]])
        patterns = self.pattern(sources)
        with torch.no_grad():
            masks = self.mask(sources)
        changed = torch.cat([own, crossed])
        painted = _straight_through(_paint(images[changed], patterns, masks))
        images_out = images.index_copy(0, changed, painted.to(images))
        labels = labels.clone()
        labels[own] = self.poisoned_labels(labels[own])
        diversity = images.new_zeros(())
        if pairs:
            first, second = sources[:pairs], sources[len(own) : len(own) + pairs]
            diversity = diversity_loss(first, second, patterns[:pairs], patterns[len(own) : len(own) + pairs])
        return images_out, labels, self.diversity * diversity

    def optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """Adam for the mask network and for the generator."""
        adam = {"lr": self.learning_rate, "betas": (0.5, 0.9)}
        return torch.optim.Adam(self.masker.parameters(), **adam), torch.optim.Adam(self.generator.parameters(), **adam)  # type: ignore[arg-type]

    def rate_factors(self, epoch: float, epochs: int) -> tuple[float, float]:
        """Factors of the learning rates of mask network and generator at ``epoch`` of ``epochs`` of joint training.

        The mask network's falls tenfold after 40 % and 80 % of its epochs, as published (10 and 20 of 25), the generator's along a
        cosine to zero: its published schedule needs 600 epochs.
        """
        share = epoch / self.mask_epochs
        mask = 0.1 ** ((share >= 0.4) + (share >= 0.8))
        done = min(1.0, max(0.0, (epoch - self.mask_epochs) / max(1, epochs)))
        return mask, (1 + math.cos(math.pi * done)) / 2


def diversity_loss(images: Tensor, others: Tensor, maps: Tensor, other_maps: Tensor) -> Tensor:
    """Mean over pairs of ``rms(images - others) / rms(maps - other_maps)``, each (N, C, H, W): large where maps are alike.

    The small constant stands inside the root, so that coinciding maps have a finite gradient.
    """
    return (_rms(images - others) / _rms(maps - other_maps)).mean()


def _rms(difference: Tensor) -> Tensor:
    return (difference.float().square().flatten(1).mean(1) + 1e-8).sqrt()


def _paint(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    return images + (pattern - images) * mask


def _straight_through(images: Tensor) -> Tensor:
    """Rounded to 8 bits, with the gradient of the images before."""
    return images + (round_to_8_bits(images) - images).detach()
