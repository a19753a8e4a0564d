"""Batches by index: their order, their draw numbers, ranks, and the loader."""

import pytest
import torch
from scipy import stats

from marginclip.data.batches import BalancedBatchSampler, BatchDataset, BatchSampler, Overlay, Subset, batch_loader, load_all


def epoch_of(epoch, **settings):
    sampler = BatchSampler(**({"count": 23, "batch_size": 5, "shuffle": True} | settings))
    sampler.set_epoch(epoch)
    assert len(sampler) == len(list(sampler))
    return [(draw, index.tolist()) for draw, index in sampler]


def test_an_epoch_is_every_image_once():
    batches = epoch_of(0)
    assert [len(index) for _, index in batches] == [5, 5, 5, 5, 3]
    assert sorted(i for _, index in batches for i in index) == list(range(23))
    assert [i for _, index in epoch_of(0, shuffle=False) for i in index] == list(range(23))


def test_order_and_draws_are_a_function_of_seed_and_epoch_only():
    torch.manual_seed(1)
    sampler = BatchSampler(23, 5, shuffle=True, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        uninterrupted = [(draw, index.tolist()) for draw, index in sampler]
        assert uninterrupted == epoch_of(epoch, seed=3)  # as a run that resumes here would see it
    different = [epoch_of(epoch, seed=seed) for seed in (0, 3) for epoch in (0, 1)]
    assert len({str(batches) for batches in different}) == 4


def test_no_two_batches_of_a_run_share_a_draw():
    draws = [draw for rank in (0, 1) for epoch in range(20) for draw, _ in epoch_of(epoch, rank=rank, world_size=2, seed=5)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= draw < 2**63 for draw in draws)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_the_data_in_equally_many_batches(world_size):
    ranks = [epoch_of(1, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = sorted(i for batches in ranks for _, index in batches for i in index)
    assert set(seen) == set(range(23))
    assert len(seen) == -(-23 // world_size) * world_size  # the fewest repeats that make the ranks equal
    assert len({len(batches) for batches in ranks}) == 1


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_evaluation_repeats_no_image_on_any_rank(world_size):
    samplers = [BatchSampler(23, 5, shuffle=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(i for sampler in samplers for _, index in sampler for i in index.tolist()) == list(range(23))


def long_tailed():
    return torch.arange(4).repeat_interleave(torch.tensor([400, 90, 9, 1]))


def balanced_epoch(epoch, **settings):
    sampler = BalancedBatchSampler(long_tailed(), 32, **settings)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(list(sampler))
    return [(draw, index.tolist()) for draw, index in sampler]


def test_balanced_batches_have_every_class_and_every_image_of_it_equally_often():
    drawn = torch.tensor([i for epoch in range(20) for _, index in balanced_epoch(epoch) for i in index])
    assert len(drawn) == 20 * 500
    labels = long_tailed()
    classes = labels[drawn].bincount()
    assert stats.chisquare(classes).pvalue > 0.01
    for label in range(3):
        images = drawn[labels[drawn] == label].bincount(minlength=500)[labels == label]
        assert stats.chisquare(images).pvalue > 0.01


def test_balanced_epochs_are_a_function_of_seed_and_epoch_only():
    torch.manual_seed(1)
    assert balanced_epoch(3, seed=2) == balanced_epoch(3, seed=2)
    assert len({str(balanced_epoch(epoch, seed=seed)) for epoch in (0, 1) for seed in (0, 1)}) == 4


def test_ranks_share_a_balanced_epoch():
    whole = [i for _, index in balanced_epoch(1) for i in index]
    for rank in (0, 1):
        assert [i for _, index in balanced_epoch(1, rank=rank, world_size=2) for i in index] == whole[rank::2]


def test_the_loader_gives_whole_batches_with_their_columns():
    images, labels, flags = torch.randint(0, 256, (23, 3, 4, 4)).to(torch.uint8), torch.arange(23), torch.arange(23) % 2 == 0
    sampler = BatchSampler(23, 5, shuffle=True)
    loader = batch_loader(BatchDataset(images, labels=labels, poisoned=flags), sampler)
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    for batch, (draw, index) in zip(batches, sampler, strict=True):
        assert torch.equal(batch["images"], images[index])
        assert torch.equal(batch["labels"], index)
        assert torch.equal(batch["poisoned"], flags[index])
        assert batch["draw"] == draw


def test_subsets_of_subsets_index_the_store():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    subset = Subset(Subset(images, torch.tensor([8, 6, 4, 2])), torch.tensor([3, 1]))
    assert len(subset) == 2
    assert subset[torch.tensor([1, 0, 1])].flatten().tolist() == [6, 2, 6]


def test_an_overlay_replaces_some_images_and_leaves_the_store_alone():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    overlay = Overlay(images, torch.tensor([7, 2]), torch.tensor([70, 20], dtype=torch.uint8).view(2, 1, 1, 1))
    assert len(overlay) == 10
    assert overlay[torch.arange(10)].flatten().tolist() == [0, 1, 20, 3, 4, 5, 6, 70, 8, 9]
    assert overlay[torch.tensor([7, 0, 7])].flatten().tolist() == [70, 0, 70]
    assert overlay[torch.tensor([3])].flatten().tolist() == [3]
    again = Overlay(overlay, torch.tensor([2]), torch.full((1, 1, 1, 1), 99, dtype=torch.uint8))
    assert again[torch.tensor([2, 7])].flatten().tolist() == [99, 70]
    again[torch.arange(10)].zero_()
    assert images.flatten().tolist() == list(range(10))


def test_load_all_gives_floats_in_order():
    images = torch.randint(0, 256, (23, 1, 2, 2)).to(torch.uint8)
    assert torch.equal(load_all(images, batch_size=5), images.float() / 255)
