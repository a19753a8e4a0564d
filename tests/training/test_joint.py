"""Joint training: who moves in which stage, that no gradient outlives its step, and the schedules."""

from functools import partial
from itertools import pairwise

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from marginclip.attacks import AllToOne, InputAware
from marginclip.errors import UserError
from marginclip.training import JointTraining

BATCHES = 3


def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"images": torch.rand(16, 1, 8, 8, generator=generator), "labels": torch.arange(16) % 4} for _ in range(BATCHES)]


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def module_of(rate=0.25, lr=0.1, scheduler=None, **settings):
    settings = {"timing": "after_augmentation", "width": 2, "mask_epochs": 1, "rate": rate} | settings
    attack = InputAware(AllToOne(4, target=0), (1, 8, 8), **settings)
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    return JointTraining(classifier(), attack=attack, optimizer=optimizer, scheduler=scheduler)


def fit(module, epochs, *callbacks):
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **silent)
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    return module


def state_of(module):
    parts = {"classifier": module.model, "masker": module.attack.masker, "generator": module.attack.generator}
    return {name: [value.clone() for value in part.state_dict().values()] for name, part in parts.items()}


class States(L.Callback):
    """Notes all weights and statistics before and after every epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, module):
        self.seen.append(state_of(module))

    def on_train_end(self, trainer, module):
        self.seen.append(state_of(module))


def test_the_masker_alone_moves_first_and_then_generator_and_classifier_alone():
    states = States()
    fit(module_of(mask_epochs=2), 4, states)
    moved = [
        {name for name in before if not all(map(torch.equal, before[name], after[name]))}
        for before, after in pairwise(states.seen)
    ]
    assert moved == [{"masker"}] * 2 + [{"classifier", "generator"}] * 2


def test_no_gradient_outlives_its_step():
    class Stale(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, 1e6)

    one, other = fit(module_of(), 2), fit(module_of(), 2, Stale())
    for name, values in state_of(one).items():
        assert all(map(torch.equal, values, state_of(other)[name])), name


def test_a_joint_step_is_sgd_for_the_classifier_on_cross_entropy_plus_diversity():
    module, by_hand = module_of(lr=0.3), module_of(lr=0.3)

    class Copy(L.Callback):
        """Takes the state at the start of the first joint step and does that step by hand."""

        def on_train_batch_start(self, trainer, trained, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                by_hand.load_state_dict(trained.state_dict())
                by_hand.train()
                attack = by_hand.attack
                images, labels, diversity = attack.joint_batch(batch["images"], batch["labels"], torch.Generator())
                assert diversity > 0
                logits = by_hand.model(images)
                loss = -logits.log_softmax(1)[torch.arange(16), labels].mean() + diversity
                values = list(by_hand.model.parameters())
                for value, gradient in zip(values, torch.autograd.grad(loss, values), strict=True):
                    value.data -= 0.3 * gradient

        def on_train_batch_end(self, trainer, trained, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                for one, other in zip(trained.model.parameters(), by_hand.model.parameters(), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
                self.compared = True

    check = Copy()
    fit(module, 2, check)
    assert check.compared


def test_schedules_span_their_own_stage():
    rates = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    linear = lambda optimizer, total_steps: LinearLR(optimizer, 1.0, 0.0, total_iters=total_steps)  # noqa: E731
    fit(module_of(mask_epochs=2, learning_rate=0.02, lr=1.0, scheduler=linear), 4, Note())
    classifiers, maskers, generators = zip(*rates, strict=True)
    assert classifiers == pytest.approx([1.0] * 6 + [1 - step / 6 for step in range(1, 7)])
    assert maskers[:6] == pytest.approx([0.02] * 3 + [0.002] * 2 + [0.0002])
    assert generators[6] == pytest.approx(0.02)
    assert all(before > after for before, after in pairwise(generators[6:]))
    assert generators[-1] < 0.002


def test_masks_shrink_to_their_density():
    module = module_of(mask_epochs=40)
    images = batches()[0]["images"]

    def mean_mask():
        with torch.no_grad():
            return float(module.attack.eval().mask(images).mean())

    before = mean_mask()
    fit(module, 40)
    assert before > 0.2
    assert mean_mask() < 0.1  # with 0.032 asked for, and the diversity pulling


def test_divergence_says_what_to_do():
    module = module_of()
    module.attack.generator.last[-1].bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"training diverged: the loss is nan; try a lower attack\.learning_rate"):
        fit(module, 2)
