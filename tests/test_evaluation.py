"""Evaluation against predictions by hand: which images count, and what a detector scores."""

import lightning as L
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader

from marginclip.errors import UserError
from marginclip.evaluation import Evaluation
from marginclip.maxmargin import MarginDropDetector


class Table(nn.Module):
    """A network that knows the logits of every image by its number, which is the image's only pixel."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images):
        return self.logits[images.flatten(1)[:, 0].long()]


def always(label, count):
    """Logits of a network that decides ``label`` whatever it sees."""
    return torch.eye(4)[torch.full((count,), label)]


def pixels(first, count):
    return torch.arange(first, first + count).float().view(-1, 1, 1, 1)


def loaders(labels, sources, targets, batch_size=7):
    """The clean and the triggered loader: images 0.. are clean, those behind them triggered."""
    clean = [
        {"images": image, "labels": label}
        for image, label in zip(pixels(0, len(labels)).split(batch_size), labels.split(batch_size), strict=True)
    ]
    parts = (pixels(len(labels), len(sources)), sources, targets)
    triggered = [
        {"images": image, "sources": source, "targets": target}
        for image, source, target in zip(*(part.split(batch_size) for part in parts), strict=True)
    ]
    return [DataLoader(batches, batch_size=None) for batches in (clean, triggered) if batches]


def evaluate(evaluation, *parts, **settings):
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.test(evaluation, loaders(*parts, **settings), verbose=False)
    return evaluation.results()


@pytest.fixture
def setup():
    """Forty clean images, and the thirty of them that all2one with target 2 may flip."""
    labels = torch.arange(40) % 4
    sources = labels[labels != 2]
    return labels, sources, torch.full_like(sources, 2)


NONE = torch.empty(0, dtype=torch.long)


def test_perfect_and_captured_networks(setup):
    labels, sources, targets = setup
    perfect = Table(torch.eye(4)[torch.cat([labels, sources])])
    captured = Table(torch.eye(4)[torch.cat([labels, targets])])
    constant = Table(always(2, 70))
    found = evaluate(Evaluation({"none": perfect, "captured": captured, "constant": constant}), *setup)
    assert found["none"] == {"acc": 1, "asr": 0, "pacc": 1}
    assert found["captured"] == {"acc": 1, "asr": 1, "pacc": 0}
    assert found["constant"] == {"acc": 0.25, "asr": 1, "pacc": 0}


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_counts_by_loop(setup, batch_size):
    labels, sources, targets = setup
    logits = torch.randn(70, 4, generator=torch.Generator().manual_seed(0))
    found = evaluate(Evaluation({"none": Table(logits)}), *setup, batch_size=batch_size)["none"]
    decisions = logits.argmax(1).tolist()
    assert found["acc"] == pytest.approx(sum(map(int.__eq__, decisions[:40], labels.tolist())) / 40)
    assert found["asr"] == pytest.approx(sum(map(int.__eq__, decisions[40:], targets.tolist())) / 30)
    assert found["pacc"] == pytest.approx(sum(map(int.__eq__, decisions[40:], sources.tolist())) / 30)


def test_cross_triggered_images_count_as_right_by_their_true_label_and_for_nothing_else(setup):
    """Thirty more images, of which every third is taken for its true class, the others for the target."""
    labels, sources, targets = setup
    crossed = torch.where(torch.arange(30) % 3 == 0, sources, targets)
    network = Table(torch.eye(4)[torch.cat([labels, targets, crossed])])
    bounded = Table(torch.eye(4)[torch.cat([labels, sources, sources])])
    detector = MarginDropDetector.from_logits(network, bounded, draw(0), draw(1), correction="exclude")
    third = [
        {"images": image, "sources": source} for image, source in zip(pixels(70, 30).split(7), sources.split(7), strict=True)
    ]
    evaluation = Evaluation({"none": network, "mmac": bounded}, {"mmdf": ("mmac", detector)})
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.test(evaluation, [*loaders(*setup), DataLoader(third, batch_size=None)], verbose=False)
    found = evaluation.results()
    assert found["none"] == {"acc": 1, "asr": 1, "pacc": 0, "cross_acc": pytest.approx(1 / 3)}
    assert found["mmac"] == {"acc": 1, "asr": 0, "pacc": 1, "cross_acc": 1}
    assert len(evaluation.scores("mmdf")["triggered"]) == 30


def test_without_triggered_images_there_is_no_asr(setup):
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    pair = (Table(logits), Table(logits + 0.1 * torch.randn(40, 4, generator=torch.Generator().manual_seed(2))))
    detector = MarginDropDetector.from_logits(*pair, pair[0].logits, pair[1].logits)
    found = evaluate(Evaluation({"none": pair[0], "mmac": pair[1]}, {"mmdf": ("mmac", detector)}), setup[0], NONE, NONE)
    assert set(found["none"]) == set(found["mmac"]) == {"acc"}
    assert set(found["mmdf"]) == {"acc", "fpr"}


@pytest.mark.parametrize("scale", [1.0, 40.0])  # logits of large networks go far beyond where a float32 sigmoid saturates
def test_detectors_by_sklearn_and_by_hand(setup, scale):
    labels, sources, targets = setup
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(70, 4, generator=generator)
    drop = torch.cat([torch.full((40,), 0.3), torch.full((30,), 0.8)]).unsqueeze(1)
    bounded = logits + scale * drop * torch.randn(70, 4, generator=generator)
    clean = scale * torch.randn(200, 4, generator=generator)
    noisy = clean + 0.3 * scale * torch.randn(200, 4, generator=generator)
    networks = {"none": Table(logits), "mmac": Table(bounded)}
    detector = MarginDropDetector.from_logits(*networks.values(), clean, noisy, theta=0.05, correction="exclude")
    evaluation = Evaluation(networks, {"mmdf": ("mmac", detector)})
    found = evaluate(evaluation, *setup)["mmdf"]
    wanted = detector.decide(logits, bounded)
    assert 0 < int(wanted.flagged[:40].sum()) < int(wanted.flagged[40:].sum())
    assert found["fpr"] == pytest.approx(float(wanted.flagged[:40].float().mean()))
    assert found["tpr"] == pytest.approx(float(wanted.flagged[40:].float().mean()))
    assert found["auroc"] == pytest.approx(roc_auc_score([0] * 40 + [1] * 30, wanted.statistic), abs=1e-6)
    assert found["acc"] == pytest.approx(float((wanted.decisions[:40] == labels).float().mean()))
    assert found["asr"] == pytest.approx(float((wanted.decisions[40:] == targets).float().mean()))
    assert found["pacc"] == pytest.approx(float((wanted.decisions[40:] == sources).float().mean()))
    scores = evaluation.scores("mmdf")
    torch.testing.assert_close(scores["clean"], wanted.statistic[:40])
    torch.testing.assert_close(scores["triggered"], wanted.statistic[40:])


@pytest.mark.parametrize("correction", ["exclude", "insist", "reject"])
@pytest.mark.parametrize("rule", ["paper", "repaired", "or_disagree"])
def test_outcomes_tell_what_a_detector_with_another_threshold_does(setup, rule, correction):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(70, 4, generator=generator)
    bounded = logits + 0.8 * torch.randn(70, 4, generator=generator)
    networks = {"none": Table(logits), "mmac": Table(bounded)}

    def run(theta):
        detector = MarginDropDetector.from_logits(
            *networks.values(), draw(0), draw(1), theta=theta, rule=rule, correction=correction
        )
        evaluation = Evaluation(networks, {"mmdf": ("mmac", detector)})
        return detector.threshold, evaluate(evaluation, *setup)["mmdf"], evaluation

    _, _, noted = run(0.2)
    scores, outcomes = noted.scores("mmdf"), noted.outcomes("mmdf")
    for theta in (0.05, 0.4, 0.9):
        threshold, found, _ = run(theta)
        for metric, outcome in (("acc", "clean_correct"), ("asr", "triggered_success"), ("pacc", "triggered_restored")):
            above = scores[outcome.partition("_")[0]] >= threshold
            holds = [
                bool(code & (2 if high else 1)) for code, high in zip(outcomes[outcome].tolist(), above.tolist(), strict=True)
            ]
            assert sum(holds) / len(holds) == pytest.approx(found[metric])
        for metric, kind, outcome in (("fpr", "clean", "clean_correct"), ("tpr", "triggered", "triggered_success")):
            flagged = (scores[kind] >= threshold) | (outcomes[outcome] >= 4)
            assert float(flagged.float().mean()) == pytest.approx(found[metric])


def test_rejected_images_are_neither_right_nor_captured(setup):
    labels, _, targets = setup
    logits = torch.eye(4)[torch.cat([labels, targets])] * 9
    bounded = logits.clone()
    bounded[40:] = 0
    detector = MarginDropDetector.from_logits(
        Table(logits), Table(bounded), draw(0), draw(0) + 0.01 * draw(1), correction="reject", null_distribution="gaussian"
    )
    networks = {"none": Table(logits), "mmac": Table(bounded)}
    found = evaluate(Evaluation(networks, {"mmdf": ("mmac", detector)}), *setup)["mmdf"]
    assert found == {"acc": 1, "asr": 0, "pacc": 0, "fpr": 0, "tpr": 1, "auroc": 1}


def draw(seed):
    return torch.randn(50, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["none", "mmac"])
def test_logits_that_are_not_finite_are_refused(setup, bad, name):
    networks = {"none": Table(always(0, 70)), "mmac": Table(always(0, 70))}
    networks[name].logits[50, 3] = bad
    with pytest.raises(UserError, match=f"the network '{name}' gives NaN or infinite logits"):
        evaluate(Evaluation(networks), *setup)


def test_one_pass_serves_everything(setup):
    """Every network runs once on each batch, however many detectors look at it."""
    calls = []
    network = Table(always(1, 70))
    network.register_forward_hook(lambda *_: calls.append(1))
    other = Table(always(1, 70))
    detectors = {name: ("mmac", MarginDropDetector.from_logits(network, other, draw(0), draw(1))) for name in ("a", "b")}
    evaluate(Evaluation({"none": network, "mmac": other}, detectors), *setup, batch_size=10)
    assert len(calls) == 4 + 3


def detailed(setup, **settings):
    """The evaluation of a network, a repair and a rejecting detector, with the scores of every class."""
    labels, _, targets = setup
    logits = torch.randn(70, 4, generator=torch.Generator().manual_seed(4)) + 2 * torch.eye(4)[torch.cat([labels, targets])]
    bounded = logits.clone()
    bounded[::3] *= -1  # images whose margin drops: some of them are clean
    networks = {"none": Table(logits), "mmac": Table(bounded)}
    detector = MarginDropDetector.from_logits(*networks.values(), draw(0), draw(0) + 0.01 * draw(1), correction="reject")
    evaluation = Evaluation(networks, {"mmdf": ("mmac", detector)}, num_classes=4, **settings)
    found = evaluate(evaluation, *setup)
    return evaluation, found, {"none": logits, "mmac": bounded, "mmdf": detector.decide(logits, bounded).decisions}


CALIBRATION = {"ece", "mce", "nll", "brier"}


def test_scores_of_every_class_are_those_of_the_clean_images_alone(setup):
    labels = setup[0]
    evaluation, found, given = detailed(setup)
    for name, values in given.items():
        decisions = (values if name == "mmdf" else values.argmax(1))[:40]
        expected = [
            sum(d == t == label for d, t in zip(decisions.tolist(), labels.tolist(), strict=True)) / 10 for label in range(4)
        ]
        assert evaluation.per_class()[name] == pytest.approx(expected, abs=1e-6)
        assert found[name]["acc"] == pytest.approx(sum(expected) / 4)  # balanced test set
        assert found[name]["worst_class"] == pytest.approx(min(expected))
        confusion = evaluation.class_arrays()[f"confusion/{name}"]
        assert confusion.dtype == torch.int32
        assert confusion.sum(1).tolist() == [10] * 4
        assert confusion[:, :4].diagonal().tolist() == pytest.approx([10 * value for value in expected])
        assert confusion[:, 4:].sum() == (decisions == -1).sum()
    assert evaluation.class_arrays()["confusion/mmdf"].shape == (4, 5)  # the detector rejects
    assert evaluation.class_arrays()["confusion/none"].shape == (4, 4)


def test_decisions_without_logits_have_no_calibration(setup):
    evaluation, found, given = detailed(setup)
    assert set(found["none"]) == set(found["mmac"]) == {"acc", "asr", "pacc", "macro_f1", "worst_class"} | CALIBRATION
    assert set(found["mmdf"]) == {"acc", "asr", "pacc", "fpr", "tpr", "auroc", "macro_f1", "worst_class"}
    assert [name for name in evaluation.class_arrays() if "reliability" in name] == ["reliability/none", "reliability/mmac"]
    wanted = nn.functional.cross_entropy(given["none"][:40], setup[0])
    assert found["none"]["nll"] == pytest.approx(wanted.item(), rel=1e-5)
    assert evaluation.class_arrays()["reliability/none"][:, 0].sum() == 40


def test_common_and_rare_classes_go_by_the_training_images(setup):
    evaluation, found, _ = detailed(setup, training_counts=torch.tensor([500, 200, 100, 3]))
    for name, each in evaluation.per_class().items():
        assert found[name]["many"] == pytest.approx((each[0] + each[1]) / 2)
        assert (found[name]["medium"], found[name]["few"]) == (pytest.approx(each[2]), pytest.approx(each[3]))
    assert "few" not in detailed(setup, training_counts=torch.full((4,), 50))[1]["none"]
    assert "medium" not in detailed(setup)[1]["none"]


def test_a_class_without_test_images_is_null_and_a_thousand_classes_keep_no_confusion(setup):
    evaluation = Evaluation({"none": Table(torch.randn(40, 1000))}, num_classes=1000)
    evaluate(evaluation, setup[0], NONE, NONE)
    each = evaluation.per_class()["none"]
    assert len(each) == 1000
    assert all(isinstance(value, float) for value in each[:4]) and set(each[4:]) == {None}
    assert list(evaluation.class_arrays()) == ["reliability/none"]


def test_without_a_number_of_classes_there_are_no_scores_of_classes(setup):
    evaluation = Evaluation({"none": Table(torch.randn(70, 4))})
    evaluate(evaluation, *setup)
    assert evaluation.per_class() == evaluation.class_arrays() == {}
