"""Training with another loss, validation class by class, and the second stage that moves the last layer alone."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from marginclip.errors import UserError
from marginclip.losses import GCL, LDAM, Mixup, with_cosine_head
from marginclip.training import ClassifierTraining, HeadTraining, LongTailTraining, cosine_to_zero
from marginclip.training.classifier import LOSS_STREAM

COUNTS = torch.tensor([400, 40, 4])
SGD = partial(torch.optim.SGD, lr=0.1)


def batch(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"images": torch.rand(count, 1, 4, 4, generator=generator), "labels": torch.arange(count) % 3}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def trainer(epochs=1, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, **quiet, **settings)


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


def moved(one, other):
    """Names of the entries of two states that differ in any bit."""
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


# -- any loss ------------------------------------------------------------------------------------------------------------------


def test_steps_are_sgd_on_the_loss_with_a_generator_of_seed_and_step():
    loss = GCL(scale=10, margin=0.1, focal=1.0)
    trained = loss.adapt(model(), COUNTS)
    by_hand, batches = copy.deepcopy(trained), [batch(seed=seed) for seed in range(3)]
    trainer().fit(ClassifierTraining(trained, optimizer=SGD, loss=loss, seed=7), loader(*batches))
    for step, one in enumerate(batches):
        generator = torch.Generator().manual_seed(7 * 1_000_003 + step + LOSS_STREAM)
        value = loss(by_hand, one["images"], one["labels"], generator)
        weights = list(by_hand.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(value, weights), strict=True):
            weight.data -= 0.1 * gradient
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, msg=name)


def test_seeds_draw_differently():
    states = []
    for seed in (0, 1, 0):
        network = model()
        trainer().fit(ClassifierTraining(network, optimizer=SGD, loss=Mixup(), seed=seed), loader(batch(), batch()))
        states.append(network.state_dict())
    assert not moved(states[0], states[2])
    assert moved(states[0], states[1])


def test_the_loss_is_told_every_epoch_before_it():
    loss, seen = LDAM(reweight_from=0.5), []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(loss.reweighted)

    for module in (ClassifierTraining, partial(HeadTraining, class_counts=COUNTS)):
        trained = module(loss.adapt(model(), COUNTS), optimizer=SGD, loss=loss)
        trainer(4, callbacks=[Note()]).fit(trained, loader(batch(), batch()))
    assert seen == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4


def test_smoothing_would_have_no_effect():
    ClassifierTraining(model(), optimizer=SGD, label_smoothing=0.1)
    with pytest.raises(UserError, match=r"training\.label_smoothing acts on loss=cross_entropy alone.*got 0\.1"):
        ClassifierTraining(model(), optimizer=SGD, label_smoothing=0.1, loss=Mixup())


# -- validation class by class -------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Decides as the first pixel says."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 6).float()


def decided(decisions, labels):
    images = torch.zeros(len(decisions), 1, 2, 2)
    images[:, 0, 0, 0] = torch.tensor(decisions, dtype=torch.float)
    return {"images": images, "labels": torch.tensor(labels)}


def validated(counts, *batches):
    runner = trainer()
    module = LongTailTraining(Fixed(), optimizer=SGD, class_counts=torch.tensor(counts))
    runner.validate(module, loader(*batches), verbose=False)
    return {name: round(float(value), 4) for name, value in runner.callback_metrics.items()}


def test_validation_logs_means_over_classes_and_groups():
    # Class 0: 3 of 4, 1: 0 of 1, 2: 1 of 1, 3: 1 of 2, 4: 0 of 2; class 5 has no images here.
    batches = decided([0, 0, 1, 0, 2], [0, 0, 0, 0, 1]), decided([2, 3, 4, 0, 0], [2, 3, 3, 4, 4])
    found = validated([900, 300, 60, 30, 9, 3], *batches)
    assert found == {
        "val/acc": 0.5, "val/class_acc": 0.45, "val/many": 0.375, "val/medium": 0.75, "val/few": 0.0,
    }  # fmt: skip


def test_groups_that_there_are_not_are_not_logged():
    found = validated([500] * 6, decided([0, 1], [0, 2]))
    assert found == {"val/acc": 0.5, "val/class_acc": 0.5, "val/many": 0.5}


def test_every_validation_counts_anew():
    module, runner = LongTailTraining(Fixed(), optimizer=SGD, class_counts=torch.tensor([5] * 6)), trainer()
    for decision, wanted in ((0, 1.0), (1, 0.0)):
        runner.validate(module, loader(decided([decision], [0])), verbose=False)
        assert float(runner.callback_metrics["val/few"]) == wanted


# -- the second stage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [True, False])
def test_the_second_stage_moves_the_last_layer_alone(cosine):
    network = with_cosine_head(model(), 3, scale=20) if cosine else model()
    before, rates, modes = copy.deepcopy(network.state_dict()), [], []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if not rates:
                assert not moved(before, module.model.state_dict())  # it starts at the first stage's weights
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            modes.append(module.model.training)

    decaying = partial(torch.optim.SGD, lr=0.002, momentum=0.9, weight_decay=2e-4)
    module = HeadTraining(network, optimizer=decaying, scheduler=cosine_to_zero, loss=Mixup(), class_counts=COUNTS)
    trainer(2, callbacks=[Note()]).fit(module, loader(batch(), batch()), loader(batch()))
    assert moved(before, network.state_dict()) == ({"4.weight"} if cosine else {"4.weight", "4.bias"})
    assert rates == pytest.approx([0.002, 0.0017071, 0.001, 0.0002929], rel=1e-3)
    assert modes == [False] * 4


def test_the_second_stage_is_sgd_on_fixed_features():
    loss = GCL(scale=20, margin=0.1, focal=1.0)
    network = loss.adapt(model().eval(), COUNTS)
    by_hand = copy.deepcopy(network)
    trainer().fit(HeadTraining(network, optimizer=SGD, loss=loss, class_counts=COUNTS), loader(batch()))
    generator = torch.Generator().manual_seed(LOSS_STREAM)
    value = loss(by_hand.eval(), batch()["images"], batch()["labels"], generator)
    weight = by_hand[4].weight
    (gradient,) = torch.autograd.grad(value, weight)
    torch.testing.assert_close(network[4].weight, weight - 0.1 * gradient)
