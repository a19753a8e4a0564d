"""ACC, ASR, PACC and flagged rates on predictions made by hand."""

import pytest
import torch

from marginclip.attacks import AllToAll, AllToOne, OneToOne
from marginclip.metrics import AttackSuccessRate, CleanAccuracy, FlaggedRate, PoisonedAccuracy, share_equal

TEST_LABELS = torch.arange(10).repeat_interleave(950)  # CIFAR-10's test split without 50 clean images a class


def rates(decide, x2x):
    """ASR and PACC, batch by batch, of a decision function of the true labels; and how many images they count."""
    sources = TEST_LABELS[x2x.eligible(TEST_LABELS)]
    success, kept = AttackSuccessRate(), PoisonedAccuracy()
    for batch in sources.split(700):
        success.update(decide(batch), x2x.flipped(batch))
        kept.update(decide(batch), batch)
    return success.compute().item(), kept.compute().item(), int(success.count)


@pytest.mark.parametrize(
    ("x2x", "count"), [(AllToOne(10, target=4), 8550), (OneToOne(10, source=1, target=2), 950), (AllToAll(10), 9500)]
)
def test_decisions_by_hand(x2x, count):
    assert rates(lambda labels: labels, x2x) == (0, 1, count)  # perfect
    assert rates(x2x.flipped, x2x) == (1, 0, count)  # every trigger works
    assert rates(lambda labels: torch.full_like(labels, -1), x2x) == (0, 0, count)  # all rejected


def test_always_the_target_is_full_success_and_the_chance_of_a_clean_class():
    assert rates(lambda labels: torch.full_like(labels, 4), AllToOne(10, target=4)) == (1, 0, 8550)
    accuracy = CleanAccuracy()
    accuracy.update(torch.full_like(TEST_LABELS, 4), TEST_LABELS)
    assert accuracy.compute().item() == pytest.approx(0.1)


@pytest.mark.parametrize("x2x", [AllToOne(10), OneToOne(10), AllToAll(10)], ids=lambda x2x: x2x.name)
def test_success_and_poisoned_accuracy_never_exceed_one_and_count_as_a_loop_does(x2x):
    decisions = torch.randint(-1, 10, (9500,), generator=torch.Generator().manual_seed(0))
    chosen = x2x.eligible(TEST_LABELS)
    sources, made = TEST_LABELS[chosen], iter(decisions[chosen].split(700))
    success, kept = AttackSuccessRate(), PoisonedAccuracy()
    for batch in sources.split(700):
        decided = next(made)
        success.update(decided, x2x.flipped(batch))
        kept.update(decided, batch)
    pairs = list(zip(decisions[chosen].tolist(), sources.tolist(), x2x.flipped(sources).tolist(), strict=True))
    assert success.compute().item() == pytest.approx(sum(d == t for d, _, t in pairs) / len(pairs))
    assert kept.compute().item() == pytest.approx(sum(d == s for d, s, _ in pairs) / len(pairs))
    assert success.compute() + kept.compute() <= 1


def test_rejected_images_are_not_correct():
    accuracy = CleanAccuracy()
    accuracy.update(torch.tensor([0, -1, 2, -1]), torch.tensor([0, 1, 2, 3]))
    assert accuracy.compute() == 0.5
    assert share_equal(torch.tensor([0, -1]), torch.tensor([0, 1])) == 0.5


def test_flagged_rate_counts_flags_and_starts_afresh():
    rate = FlaggedRate()
    rate.update(torch.tensor([True, False, False]))
    rate.update(torch.tensor([True]))
    assert rate.compute() == 0.5
    rate.reset()
    rate.update(torch.tensor([False]))
    assert rate.compute() == 0


def test_no_samples_give_no_number():
    assert share_equal(torch.tensor([]), torch.tensor([])).isnan()
    accuracy = CleanAccuracy()
    accuracy.update(torch.tensor([]), torch.tensor([]))
    assert accuracy.compute().isnan()


def test_full_precision_counts():
    """A mean of float32 batch means would lose single hits among many images."""
    accuracy = CleanAccuracy()
    for size in (20_000_000, 1):
        accuracy.update(torch.zeros(size, dtype=torch.int8), torch.zeros(1, dtype=torch.int8).expand(size))
    accuracy.update(torch.zeros(1), torch.ones(1))
    assert (int(accuracy.hits), int(accuracy.count)) == (20_000_001, 20_000_002)
