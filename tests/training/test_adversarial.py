"""Single-step adversarial training: the moved images by hand, and that training uses them."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from marginclip.training import AdversarialTraining


def batch(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"images": torch.rand(count, 1, 4, 4, generator=generator), "labels": torch.arange(count) % 3}


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def moved_by_hand(model, images, labels, *, eps, seed, step):
    """One signed step of 1.25 eps from the random start, with the closed form of a linear classifier's gradient."""
    shift = (torch.rand(images.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step)) * 2 - 1) * eps
    weight = model[1].weight.detach()
    error = model((images + shift).clamp(0, 1)).softmax(1).detach() - F.one_hot(labels, 3)
    shift = shift + 1.25 * eps * (error @ weight).sign().view_as(images)
    return (images + shift.clamp(-eps, eps)).clamp(0, 1)


@pytest.mark.parametrize(("eps", "seed"), [(0.1, 0), (0.3, 4)])
def test_images_are_moved_within_eps_as_by_hand(eps, seed):
    module, one = AdversarialTraining(linear(), eps=eps, seed=seed, optimizer=None), batch()
    before = one["images"].clone()
    moved = module.moved(one["images"], one["labels"], 0)
    torch.testing.assert_close(moved, moved_by_hand(module.model, before, one["labels"], eps=eps, seed=seed, step=0))
    assert torch.equal(one["images"], before)
    assert (moved - before).abs().max() <= eps + 1e-6
    assert 0 <= moved.min() and moved.max() <= 1
    assert not moved.requires_grad
    loss = [F.cross_entropy(module.model(images), one["labels"]) for images in (before, moved)]
    assert loss[1] > loss[0]


def test_steps_are_sgd_on_the_moved_images_with_another_start_in_every_step():
    trained, by_hand = linear(), linear()
    module = AdversarialTraining(trained, eps=0.1, seed=2, optimizer=partial(torch.optim.SGD, lr=0.3))
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_epochs=1, accelerator="cpu", **silent).fit(module, DataLoader([batch(), batch()], batch_size=None))
    starts = []
    for step in range(2):
        one = batch()
        images = moved_by_hand(by_hand, one["images"], one["labels"], eps=0.1, seed=2, step=step)
        starts.append(images)
        loss = F.cross_entropy(by_hand(images), one["labels"])
        for value, gradient in zip(by_hand.parameters(), torch.autograd.grad(loss, list(by_hand.parameters())), strict=True):
            value.data -= 0.3 * gradient
    assert not torch.equal(*starts)
    for one, other in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other)
