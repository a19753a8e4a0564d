"""Whole batches of uint8 images by index: one lookup a batch instead of one decode an image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from marginclip.data.images import ImageStore

BatchKey = tuple[int, Tensor]


class BatchSampler(Sampler[BatchKey]):
    """Index tensors of batches, with a draw number each that seeds what is random about the batch.

    The order is a function of ``seed`` and the epoch alone, and so is the draw number: a run that resumes at an epoch sees
    exactly what an uninterrupted one would. With several ranks each takes every ``world_size``-th image.
    """

    def __init__(
        self, count: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before every epoch."""
        self.epoch = epoch

    def _padding(self) -> int:
        """Images to repeat so that all ranks train on the same number of batches; nothing is repeated in evaluation."""
        return -self.count % self.world_size if self.shuffle else 0

    def __len__(self) -> int:
        own = len(range(self.rank, self.count + self._padding(), self.world_size))
        return (own + self.batch_size - 1) // self.batch_size

    def order(self) -> Tensor:
        """The images of this epoch by index (count,), in the order of all ranks together."""
        if not self.shuffle:
            return torch.arange(self.count)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.count, generator=generator)

    def __iter__(self) -> Iterator[BatchKey]:
        order = self.order()
        order = torch.cat([order, order[: self._padding()]])
        own = order[self.rank :: self.world_size]
        for number, index in enumerate(own.split(self.batch_size)):
            draw = ((self.seed * 1_000_003 + self.epoch) * 1_000_003 + number) * self.world_size + self.rank
            yield draw % 2**62, index


class BalancedBatchSampler(BatchSampler):
    """A :class:`BatchSampler` that draws images with replacement so that every class of ``labels`` (N,) comes equally often.

    An image's weight is 1 / (the images of its class); an epoch is as long as the data set.
    """

    def __init__(self, labels: Tensor, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(len(labels), batch_size, shuffle=True, seed=seed, rank=rank, world_size=world_size)
        self.weights = 1 / labels.bincount()[labels].double()

    def order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.multinomial(self.weights, self.count, replacement=True, generator=generator)


class BatchDataset(Dataset[dict[str, Any]]):
    """Batches of a store: ``images`` uint8 (B, C, H, W), ``labels`` (B,), every further column given, and the ``draw`` number."""

    def __init__(self, images: ImageStore, **columns: Tensor) -> None:
        self.images, self.columns = images, columns

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: BatchKey) -> dict[str, Any]:
        draw, index = key
        batch: dict[str, Any] = {name: column[index] for name, column in self.columns.items()}
        return {"images": self.images[index], "draw": draw, **batch}


def batch_loader(dataset: BatchDataset, sampler: BatchSampler, *, pin_memory: bool = False) -> DataLoader[dict[str, Any]]:
    """A DataLoader that yields the dataset's whole batches in the sampler's order."""
    return DataLoader(dataset, sampler=sampler, batch_size=None, pin_memory=pin_memory)


class Subset:
    """A view of a store on some of its images, by index (M,)."""

    def __init__(self, images: ImageStore, index: Tensor) -> None:
        self.images, self.index = images, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        return self.images[self.index[index]]


class Overlay:
    """A view of a store in which some images, by index (M,), are replaced by others, uint8 (M, C, H, W)."""

    def __init__(self, images: ImageStore, index: Tensor, replacements: Tensor) -> None:
        self.images, self.replacements = images, replacements
        self.place = torch.full((len(images),), -1)
        self.place[index] = torch.arange(len(index))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        chosen, place = self.images[index].clone(), self.place[index]
        chosen[place >= 0] = self.replacements[place[place >= 0]]
        return chosen


def load_all(images: ImageStore, batch_size: int = 512) -> Tensor:
    """Every image of a store as floats (N, C, H, W) in [0, 1]; for small sets."""
    chunks = [images[index] for index in torch.arange(len(images)).split(batch_size)]
    return torch.cat(chunks).float() / 255
