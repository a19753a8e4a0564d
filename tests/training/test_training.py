"""Training a classifier: the step, the schedule, what validation watches, and what divergence says."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from marginclip.errors import UserError
from marginclip.training import ClassifierTraining, PoisonedTraining


def batch(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"images": torch.rand(count, 1, 4, 4, generator=generator), "labels": torch.arange(count) % 3}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))


def trainer(epochs=1, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, **quiet, **settings)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_steps_are_plain_sgd_on_cross_entropy(smoothing):
    batches = [batch(6, seed) for seed in range(3)]
    trained, by_hand = model(), model()
    module = ClassifierTraining(trained, optimizer=partial(torch.optim.SGD, lr=0.3), label_smoothing=smoothing)
    trainer().fit(module, DataLoader(batches, batch_size=None))
    for one in batches:
        log_probabilities = F.log_softmax(by_hand(one["images"]), 1)
        wanted = F.one_hot(one["labels"], 3) * (1 - smoothing) + smoothing / 3
        loss = -(wanted * log_probabilities).sum(1).mean()
        for value, gradient in zip(by_hand.parameters(), torch.autograd.grad(loss, list(by_hand.parameters())), strict=True):
            value.data -= 0.3 * gradient
    for one, other in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_schedule_spans_the_whole_run_and_steps_after_every_batch():
    rates = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = ClassifierTraining(
        model(),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        scheduler=lambda optimizer, total_steps: LinearLR(optimizer, 1.0, 0.0, total_iters=total_steps),
    )
    trainer(2, callbacks=[Note()]).fit(module, DataLoader([batch(4)] * 5, batch_size=None))
    assert rates == pytest.approx([1 - step / 10 for step in range(10)])


def test_validation_watches_the_attack_beside_the_accuracy():
    def triggered(count, seed):
        return {"images": batch(count, seed)["images"], "sources": torch.arange(count) % 2, "targets": torch.full((count,), 2)}

    network = model()
    module = PoisonedTraining(network, optimizer=partial(torch.optim.SGD, lr=0.0))
    clean = [batch(5, 1), batch(2, 2)]
    attacked = [triggered(6, 3), triggered(3, 4)]
    runner = trainer()
    runner.validate(module, [DataLoader(clean, batch_size=None), DataLoader(attacked, batch_size=None)], verbose=False)
    with torch.no_grad():
        decisions = [network(torch.cat([one["images"] for one in batches])).argmax(1) for batches in (clean, attacked)]

    def share(values, key, batches):
        return float((values == torch.cat([one[key] for one in batches])).float().mean())

    found = {name: float(value) for name, value in runner.callback_metrics.items()}
    assert found["val/acc"] == pytest.approx(share(decisions[0], "labels", clean))
    assert found["val/asr"] == pytest.approx(share(decisions[1], "targets", attacked))
    assert found["val/pacc"] == pytest.approx(share(decisions[1], "sources", attacked))


def test_without_an_attack_only_the_accuracy_is_watched():
    runner = trainer()
    module = PoisonedTraining(model(), optimizer=partial(torch.optim.SGD, lr=0.0))
    runner.validate(module, DataLoader([batch(5)], batch_size=None), verbose=False)
    assert set(runner.callback_metrics) == {"val/acc"}


def test_divergence_says_what_to_do():
    module = ClassifierTraining(model(), optimizer=partial(torch.optim.SGD, lr=1e30))
    with pytest.raises(UserError, match=r"training diverged: the loss is nan; try a lower training\.optimizer\.lr"):
        trainer(3).fit(module, DataLoader([batch(6)] * 2, batch_size=None))
