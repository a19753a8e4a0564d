"""Per-class scores and calibration against loops over the samples, scikit-learn and closed forms."""

import math
from collections import Counter

import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, log_loss

from marginclip.data.imbalance import class_counts
from marginclip.metrics import CalibrationScores, DecisionScores, brier_scores, shot_accuracy, shot_groups
from marginclip.metrics.classification import NUM_BINS

CLASSES = 7
LABELS = torch.randint(0, CLASSES, (523,), generator=torch.Generator().manual_seed(0))
LOGITS = 2 * torch.randn(523, CLASSES, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(CLASSES)[LABELS]


def decided(decisions, labels=LABELS, num_classes=CLASSES, batch_size=100):
    scores = DecisionScores(num_classes)
    for decision, label in zip(decisions.split(batch_size), labels.split(batch_size), strict=True):
        scores.update(decision, label)
    return scores


def calibrated(logits, labels, batch_size=100):
    scores = CalibrationScores(logits.shape[1])
    for logit, label in zip(logits.split(batch_size), labels.split(batch_size), strict=True):
        scores.update(logit, label)
    return scores


def logits_of(confidence, num_classes=2):
    """Logits (N, K), float64, whose softmax gives class 0 the confidence (N,) and the others equal parts of what is left."""
    confidence = confidence.double().unsqueeze(1)
    rest = ((1 - confidence) / (num_classes - 1)).expand(-1, num_classes - 1)
    return torch.cat([confidence, rest], 1).log()


# -- decisions ----------------------------------------------------------------------------------------------------------------


def test_per_class_accuracy_and_confusion_count_as_a_loop_does():
    decisions = LOGITS.argmax(1)
    scores = decided(decisions)
    pairs = Counter(zip(LABELS.tolist(), decisions.tolist(), strict=True))
    sizes = Counter(LABELS.tolist())
    expected = [pairs[label, label] / sizes[label] for label in range(CLASSES)]
    assert scores.per_class().tolist() == pytest.approx(expected)
    assert scores.scores()["worst_class"] == pytest.approx(min(expected))
    confusion = scores.confusion()
    assert confusion[:, :-1].tolist() == confusion_matrix(LABELS, decisions).tolist()  # rows are the truth
    assert confusion.sum(1).tolist() == LABELS.bincount().tolist()
    assert int(confusion[:, -1].sum()) == 0


def test_macro_f1_is_that_of_a_loop_and_of_sklearn():
    decisions = LOGITS.argmax(1)
    found = decided(decisions).scores()["macro_f1"]
    each = []
    for label in range(CLASSES):
        hits = sum(d == t == label for d, t in zip(decisions.tolist(), LABELS.tolist(), strict=True))
        each.append(2 * hits / (decisions.tolist().count(label) + LABELS.tolist().count(label)))
    assert found == pytest.approx(sum(each) / CLASSES)
    assert found == pytest.approx(f1_score(LABELS, decisions, average="macro"))


def test_rejected_samples_are_wrong_for_their_class_and_nobody_elses():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    scores = decided(torch.tensor([0, -1, 1, 1, -1, -1]), labels, 3)
    assert scores.per_class().tolist() == [0.5, 1, 0]
    assert scores.confusion().tolist() == [[1, 0, 0, 1], [0, 2, 0, 0], [0, 0, 0, 2]]
    assert scores.scores()["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_a_class_without_test_images_has_no_accuracy_and_no_part_in_the_worst():
    labels = torch.tensor([0, 0, 2, 2])
    scores = decided(torch.tensor([0, 0, 2, 0]), labels, 4)
    per_class = scores.per_class()
    assert per_class.isnan().tolist() == [False, True, False, True]
    assert scores.scores() == {"macro_f1": pytest.approx((4 / 5 + 2 / 3) / 2), "worst_class": 0.5}
    assert shot_accuracy(per_class, torch.tensor([500, 500, 50, 5])) == {"many": 1.0, "medium": 0.5}


def test_overall_accuracy_of_a_balanced_test_set_is_the_mean_of_the_classes():
    labels = torch.arange(CLASSES).repeat_interleave(60)
    decisions = torch.where(torch.rand(420) < 0.6, labels, torch.randint(0, CLASSES, (420,)))
    assert decided(decisions, labels).per_class().mean().item() == pytest.approx((decisions == labels).float().mean().item())


@pytest.mark.parametrize("deterministic", [False, True])
def test_many_classes_are_counted_in_parts(monkeypatch, deterministic):
    """Under deterministic algorithms torchmetrics compares every sample with every cell: 4 GB for 500 samples at once."""
    decisions, labels = torch.randint(0, 300, (2, 150), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr("marginclip.metrics.classification.LARGEST_UPDATE", 2**21)  # 23 samples
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    scores = decided(decisions, labels, 300)
    assert int(scores.confusion().sum()) == 150
    assert int(scores.confusion().diagonal().sum()) == int((decisions == labels).sum())


# -- common and rare classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "num_classes", "largest", "ratio", "sizes"),
    [
        ("exponential", 100, 500, 100, (35, 35, 30)),
        ("exponential", 100, 500, 10, (69, 31, 0)),
        ("step", 100, 500, 100, (50, 0, 50)),
        ("step", 100, 500, 10, (50, 50, 0)),
        ("exponential", 10, 5000, 100, (8, 2, 0)),
        ("step", 10, 5000, 100, (5, 5, 0)),
        ("exponential", 10, 5000, 10, (10, 0, 0)),
        ("step", 10, 5000, 10, (10, 0, 0)),
    ],
)
def test_published_groups_of_classes(profile, num_classes, largest, ratio, sizes):
    counts = torch.tensor(class_counts(profile, num_classes, largest, ratio))
    groups = shot_groups(counts)
    assert tuple(int(groups[name].sum()) for name in ("many", "medium", "few")) == sizes
    assert (sum(mask.int() for mask in groups.values()) == 1).all()
    found = shot_accuracy(torch.rand(num_classes), counts)
    assert list(found) == [name for name, size in zip(groups, sizes, strict=True) if size]  # an empty group is missing, not 0


def test_the_edges_100_and_20_are_medium():
    groups = shot_groups(torch.tensor([101, 100, 20, 19, 0]))
    assert {name: mask.nonzero().flatten().tolist() for name, mask in groups.items()} == {
        "many": [0], "medium": [1, 2], "few": [3, 4]
    }  # fmt: skip


def test_accuracy_of_groups_is_the_mean_over_their_classes_as_in_a_loop():
    counts = torch.tensor([300, 150, 90, 20, 12, 4, 1])
    scores = decided(LOGITS.argmax(1))
    each, found = scores.per_class().tolist(), scores.scores(counts)
    assert found["many"] == pytest.approx(sum(each[:2]) / 2)
    assert found["medium"] == pytest.approx(sum(each[2:4]) / 2)
    assert found["few"] == pytest.approx(sum(each[4:]) / 3)


# -- calibration --------------------------------------------------------------------------------------------------------------


def bins_by_loop(logits, labels):
    """The (confidence, rightness) pairs of every bin, by a loop in double precision."""
    bins = [[] for _ in range(NUM_BINS)]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        weights = [math.exp(value - max(row)) for value in row]
        confidence = max(weights) / sum(weights)
        number = min(int(confidence * NUM_BINS), NUM_BINS - 1)
        bins[number].append((confidence, row.index(max(row)) == label))
    return bins


def test_calibration_is_that_of_a_loop():
    bins = bins_by_loop(LOGITS, LABELS)
    gaps = [abs(sum(c - r for c, r in pairs)) / len(pairs) if pairs else 0.0 for pairs in bins]
    metric = calibrated(LOGITS, LABELS)
    found = metric.scores()
    assert found["ece"] == pytest.approx(sum(gap * len(pairs) for gap, pairs in zip(gaps, bins, strict=True)) / 523, abs=1e-5)
    assert found["mce"] == pytest.approx(max(gaps), abs=1e-5)
    count, confidence, accuracy = metric.reliability.compute().T.tolist()
    assert count == [len(pairs) for pairs in bins]
    for number, pairs in enumerate(bins):
        if pairs:
            assert confidence[number] == pytest.approx(sum(c for c, _ in pairs) / len(pairs), abs=1e-5)
            assert accuracy[number] == pytest.approx(sum(r for _, r in pairs) / len(pairs), abs=1e-5)
        else:
            assert math.isnan(confidence[number]) and math.isnan(accuracy[number])


def test_the_errors_are_those_of_the_reliability_bins():
    metric = calibrated(20 * LOGITS, LABELS)  # sure: most confidences round to exactly 1
    bins = metric.reliability.compute()
    gaps = (bins[:, 1] - bins[:, 2]).abs().nan_to_num()
    assert metric.scores()["ece"] == pytest.approx(float((gaps * bins[:, 0]).sum() / bins[:, 0].sum()), abs=1e-6)
    assert metric.scores()["mce"] == pytest.approx(float(gaps.max()), abs=1e-6)


def test_likelihood_and_brier_are_those_of_a_loop_and_of_sklearn():
    found = calibrated(LOGITS, LABELS).scores()
    probabilities = LOGITS.double().softmax(1)
    losses, squares = [], []
    for row, label in zip(probabilities.tolist(), LABELS.tolist(), strict=True):
        losses.append(-math.log(row[label]))
        squares.append(sum((value - (number == label)) ** 2 for number, value in enumerate(row)))
    assert found["nll"] == pytest.approx(sum(losses) / 523, rel=1e-5)
    assert found["nll"] == pytest.approx(log_loss(LABELS, probabilities), rel=1e-5)
    assert found["brier"] == pytest.approx(sum(squares) / 523, rel=1e-5)


def test_a_perfectly_calibrated_toy_has_no_error():
    """Of 20 samples of confidence c = 0.55, 0.6, ..., the share c is right."""
    confidence = torch.arange(11, 20).repeat_interleave(20) / 20
    labels = torch.cat([(torch.arange(20) >= right).long() for right in range(11, 20)])
    found = calibrated(logits_of(confidence), labels).scores()
    assert found["ece"] == pytest.approx(0, abs=1e-6)
    assert found["mce"] == pytest.approx(0, abs=1e-6)


def test_all_confident_coin_flips_are_half_wrong():
    """Confidence exactly 1: counted, in the last bin."""
    logits = torch.tensor([[200.0, 0.0]]).expand(100, 2)
    metric = calibrated(logits, torch.arange(100) % 2)
    found = metric.scores()
    assert (found["ece"], found["mce"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert found["nll"] == pytest.approx(100)
    assert found["brier"] == pytest.approx(1)
    assert metric.reliability.compute()[-1].tolist() == [100, 1, 0.5]


def test_confidence_one_shares_the_last_bin_with_what_is_nearly_one():
    """Half of the samples sure and wrong, half at 0.95 and right: one bin of confidence 0.975 and accuracy 0.5, not two."""
    logits = torch.cat([torch.tensor([[200.0, 0.0]]).expand(50, 2), logits_of(torch.full((50,), 0.95)).float()])
    labels = torch.cat([torch.ones(50), torch.zeros(50)]).long()
    assert calibrated(logits, labels).scores()["ece"] == pytest.approx(0.475, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 523])
def test_calibration_does_not_depend_on_the_batches(batch_size):
    assert calibrated(LOGITS, LABELS, batch_size).scores() == pytest.approx(calibrated(LOGITS, LABELS).scores(), abs=1e-5)


def test_logits_that_look_like_probabilities_are_still_logits():
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    found = calibrated(logits, torch.tensor([0, 1])).scores()
    wanted = 1 - logits.softmax(1).max(1).values.mean().item()  # both fall into the same bin
    assert found["ece"] == pytest.approx(wanted, abs=1e-6)


def test_brier_scores_lie_between_nothing_and_two():
    scores = brier_scores(torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3]]), torch.tensor([0, 1, 2]))
    assert scores.tolist() == pytest.approx([0, 2, 2 / 3])
