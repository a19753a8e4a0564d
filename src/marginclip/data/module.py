"""The one LightningDataModule: poisoned training batches, the clean set, and the two evaluation sets."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from marginclip.attacks import Attack
from marginclip.data.augment import Augment
from marginclip.data.batches import BalancedBatchSampler, BatchDataset, BatchSampler, Overlay, Subset, batch_loader, load_all
from marginclip.data.clean import split_clean
from marginclip.data.images import ImageStore, Splits

VALIDATION_IMAGES = 1000


class ImageData(L.LightningDataModule):
    """Batches for training and evaluation of one data set under one attack (or none).

    Training batches hold ``images`` float (B, C, H, W) in [0, 1] and ``labels`` (B,); poisoned ones carry the trigger and the
    attacker's label. Evaluation has two loaders: *clean* is the evaluation set, *triggered* its eligible images with the trigger
    put on. Triggered batches also hold ``sources`` and ``targets``, the true and the attacker's labels. A third loader has images
    with another image's trigger, for attacks with such cross triggers. The clean set and the evaluation set are disjoint parts of
    the held-out split. Where no image is left for the evaluation set, the clean set takes its place.

    Args:
        splits: the data set.
        attack: poisons training images, and puts triggers on evaluation images. None: no attack, and the *clean* loader alone.
        augment: how training images are augmented. None: not at all.
        batch_size: images in a training batch of one device.
        eval_batch_size: images in an evaluation batch.
        clean_per_class: images of every class for the clean set. None: all of the held-out split.
        clean_order: ``first`` takes the first images of each class, as the published scripts do, ``seeded`` a random choice.
        reserve_per_class: so many images of every class are kept out of the evaluation set (see
            :func:`~marginclip.data.clean.split_clean`).
        seed: of the choice of the clean set, of the order of training images and of what is drawn for each training batch.

    Raises:
        UserError: for a class that has no held-out image or fewer than ``clean_per_class``, and for other settings outside
            their range.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        attack: Attack | None = None,
        augment: Augment | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        clean_per_class: int | None = 50,
        clean_order: str = "seeded",
        reserve_per_class: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.splits, self.attack, self.augment = splits, attack, augment or Augment()
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        held_out = splits.held_out
        self.clean_index, self.eval_index = split_clean(
            held_out.labels,
            held_out.classes,
            per_class=clean_per_class,
            seed=seed,
            order=clean_order,
            reserve=reserve_per_class,
        )
        train_labels = splits.train.labels
        self.train_images: ImageStore = splits.train.images
        self.class_balanced = False
        self.poisoned = (
            torch.zeros(len(train_labels), dtype=torch.bool) if attack is None else attack.poisoned_mask(train_labels)
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.splits.held_out.classes

    @property
    def class_counts(self) -> Tensor:
        """The training images of every class (K,), by their true labels."""
        return self.splits.train.labels.bincount(minlength=len(self.classes))

    def balanced(self) -> ImageData:
        """The same data, whose training batches have every class equally often, rare ones with repeated images."""
        twin = copy.copy(self)
        twin.class_balanced = True
        return twin

    def clean_set(self) -> tuple[Tensor, Tensor]:
        """The defender's clean images (M, C, H, W) float in [0, 1] and their labels (M,)."""
        held_out = self.splits.held_out
        return load_all(Subset(held_out.images, self.clean_index)), held_out.labels[self.clean_index]

    def replace_training_images(self, index: Tensor, images: Tensor) -> None:
        """Train on ``images`` uint8 (B, C, H, W) in the place of those at ``index`` (B,)."""
        self.train_images = Overlay(self.train_images, index, images)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        train = self.splits.train
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        place = {"seed": self.seed, "rank": rank, "world_size": world_size}
        sampler = (
            BalancedBatchSampler(train.labels, self.batch_size, **place)
            if self.class_balanced
            else BatchSampler(len(train), self.batch_size, shuffle=True, **place)
        )
        dataset = BatchDataset(self.train_images, labels=train.labels, poisoned=self.poisoned)
        return batch_loader(dataset, sampler, pin_memory=torch.cuda.is_available())

    def eval_dataloaders(self, *, limit: int | None = None) -> list[DataLoader[dict[str, Any]]]:
        """The clean evaluation loader and, under an attack, the triggered one; of at most ``limit`` clean images."""
        held_out = self.splits.held_out
        index = self.eval_index if len(self.eval_index) else self.clean_index
        if limit is not None and len(index) > limit:
            index = index[torch.linspace(0, len(index) - 1, limit).long()]
        labels = held_out.labels[index]
        loaders = [self._eval_loader(Subset(held_out.images, index), labels=labels)]
        if self.attack is not None:
            chosen = self.attack.x2x.eligible(labels)
            sources = labels[chosen]
            targets = self.attack.x2x.flipped(sources)
            loaders.append(self._eval_loader(Subset(held_out.images, index[chosen]), sources=sources, targets=targets))
            if self.attack.has_cross_triggers:
                crossed = torch.ones(len(sources), dtype=torch.bool)
                loaders.append(self._eval_loader(Subset(held_out.images, index[chosen]), sources=sources, crossed=crossed))
        return loaders

    def val_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """The same on evenly spaced evaluation images, at most ``VALIDATION_IMAGES``: for the curves during training."""
        return self.eval_dataloaders(limit=VALIDATION_IMAGES)

    def test_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        return self.eval_dataloaders()

    def _eval_loader(self, images: ImageStore, **columns: Tensor) -> DataLoader[dict[str, Any]]:
        sampler = BatchSampler(len(images), self.eval_batch_size, shuffle=False)
        return batch_loader(BatchDataset(images, **columns), sampler, pin_memory=torch.cuda.is_available())

    def _attack_on(self, device: torch.device) -> Attack:
        assert self.attack is not None
        # A buffer that is moved in a test loop's inference mode could never be loaded into again.
        with torch.inference_mode(False):
            return self.attack.to(device)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Turn bytes into floats, put triggers on and augment: all on the device, on the whole batch."""
        images = batch["images"].float() / 255
        if "poisoned" in batch:
            generator = torch.Generator().manual_seed(batch.pop("draw"))
            poisoned = batch.pop("poisoned")
            if self.attack is None:
                images = self.augment(images, generator)
            else:
                attack = self._attack_on(images.device)
                batch |= attack.poison_batch(images, batch["labels"], poisoned, self.augment, generator)
                images = batch["images"]
        elif self.attack is not None and "targets" in batch:
            images = self._attack_on(images.device)(images)
        elif self.attack is not None and "crossed" in batch:
            images = self._attack_on(images.device).cross_triggered(images)
        batch["images"] = images.contiguous(memory_format=torch.channels_last)
        return batch
