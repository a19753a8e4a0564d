"""An audit: what it says of a poisoned and of an honest network, what its page holds, and when it refuses."""

import json
import re

import pytest
import torch

from marginclip.defenses import MMOM, FineTune
from marginclip.defenses.choosing.evidence import Paired
from marginclip.errors import UserError
from marginclip.maxmargin import MaximumMarginTest
from marginclip.service import audit
from marginclip.service.reach import WARP_LIMIT, reach, warp_reach, warped
from marginclip.service.verdict import Findings, judge

from .conftest import TARGET, quarters, triggered

NAMES = ("north west", "<script>alert(1)</script>", "south $x$ west", "south east")
QUICK = MaximumMarginTest(starts=2, steps=5, simulations=100)


@pytest.fixture(scope="module")
def look(clean, short):
    """Audits a network quickly."""

    def look(model, **settings):
        return audit(
            model, *clean, **({"classes": NAMES, "test": QUICK, "mmac": short, "mmom": MMOM(steps=4, check_every=2)} | settings)
        )

    return look


@pytest.fixture(scope="module")
def found(look, poisoned):
    images, _ = quarters(40, seed=11)
    return look(poisoned, suspect_images=torch.cat([images, triggered(images[:20])]))


def test_a_few_small_steps_lead_from_everywhere_to_the_target(poisoned, honest, clean):
    bad, good = reach(poisoned, *clean), reach(honest, *clean)
    assert bad.suspect == TARGET
    others = bad.statistics[torch.arange(4) != TARGET]
    assert bad.statistics[TARGET] > others.max() + 1
    assert float(good.statistics.max() - good.statistics.median()) < float(bad.statistics[TARGET] - bad.statistics.median())


def test_reach_is_the_mean_margin_after_the_steps(poisoned, clean):
    from marginclip.maxmargin.margin import ascend_margins

    images, labels = clean
    found = reach(poisoned, images, labels, starts=6, steps=3, seed=4)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(4))
    for label in range(4):
        rows = [int(row) for row in order if labels[row] != label][:6]
        moved = ascend_margins(poisoned, torch.full((6,), label), images[rows], steps=3, step_size=0.01, rule="unit_rms")
        assert float(found.statistics[label]) == pytest.approx(float(moved.margins.mean()), abs=1e-3)


class WaitsForAShift(torch.nn.Module):
    """Decides by three rows of an image of 16 x 16, and for the fourth class where the ninth column is bright."""

    def forward(self, images):
        rows = images[:, :, :3].mean((1, 3))
        return torch.cat([rows, 90 * (images[..., 8].mean((1, 2)) - 8 / 15)[:, None]], 1)


def that_grow_brighter_to_the_right():
    images = torch.linspace(0, 1, 16).expand(24, 3, 16, 16)
    return images, torch.arange(24) % 3


def test_a_warp_moves_images_by_the_pixels_that_it_says():
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(warped(images, torch.zeros(1, 2, 4, 4)), images, atol=1e-5)
    control = torch.zeros(1, 2, 4, 4)
    control[:, 0] = 1 / 31  # a pixel: there are 31 steps between the centres of the first and the last
    to_the_left = warped(images, control)
    assert torch.allclose(to_the_left[..., :-1], images[..., 1:], atol=1e-4)
    assert torch.allclose(to_the_left[..., -1], images[..., -1], atol=1e-4)  # beyond the edge the edge goes on


def test_a_class_that_a_warp_leads_to_stands_out():
    found = warp_reach(WaitsForAShift(), *that_grow_brighter_to_the_right())
    assert found.suspect == 3
    assert found.detected
    assert float(found.statistics.min()) >= 0
    assert (
        0.9 * 90 / 32 < float(found.statistics[3]) < 1.5 * 90 / 32
    )  # a thirty-second of the side, more between control points


def test_the_warp_is_one_for_all_images_and_stays_small(monkeypatch):
    from marginclip.service import reach as module

    seen = []

    def noted(images, control):
        seen.append(control.detach().clone())
        return warped(images, control)

    monkeypatch.setattr(module, "warped", noted)
    monkeypatch.setattr(module, "images_that_fit", lambda *_: 4)  # parts share the warp
    parts = warp_reach(WaitsForAShift(), *that_grow_brighter_to_the_right(), steps=3)
    assert all(control.shape == (1, 2, 4, 4) and float(control.abs().max()) <= WARP_LIMIT for control in seen)
    monkeypatch.setattr(module, "images_that_fit", lambda *_: 100)
    at_once = warp_reach(WaitsForAShift(), *that_grow_brighter_to_the_right(), steps=3)
    assert torch.allclose(parts.statistics, at_once.statistics, atol=1e-4)
    with torch.inference_mode():
        again = warp_reach(WaitsForAShift(), *that_grow_brighter_to_the_right(), steps=3)
    assert torch.equal(again.statistics, at_once.statistics)


def test_it_leaves_the_model_and_says_what_it_did(found, poisoned, look):
    before = {name: value.clone() for name, value in poisoned.state_dict().items()}
    parts = []
    look(poisoned, progress=parts.append)
    assert parts == [
        "maximum margins",
        "reach of every class",
        "reach by warping",
        "mmom out of fold",
        "mmac out of fold",
        "mmac",
        "reach under the bounds",
    ]
    assert all(torch.equal(value, before[name]) for name, value in poisoned.state_dict().items())
    assert set(found.seconds) == set(parts)


def test_its_numbers_are_plain(found):
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["found"]["images"] == 80
    assert content["suspicious_images"]["images"] == 60
    assert content["reach"]["suspect"] == TARGET
    assert len(content["reach_under_bounds"]["statistics"]) == len(content["reach_by_warping"]["statistics"]) == 4
    assert len(content["maximum_margins"]["statistics"]) == 4
    assert sum(content["found"]["changed_to"]) == sum(content["found"]["changed_from"]) == content["found"]["changed"]


def test_the_page_stands_alone_and_escapes_names(found, tmp_path):
    page = found.write_html(tmp_path / "audit.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)
    assert page.count("data:image/png;base64,") >= 5 + 4  # the charts, and a picture of every class
    for line in (*found.verdict.reasons, *found.verdict.not_tested):
        assert str(line).split('"')[0][:30].replace("'", "&#39;") in page


def test_few_classes_and_wrong_names_are_refused(look, poisoned, clean):
    with pytest.raises(UserError, match="logits of 4 classes, not of 2"):
        look(poisoned, classes=("a", "b"))
    two = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    with pytest.raises(UserError, match="needs at least 3 classes, got 2"):
        audit(two, clean[0], clean[1] % 2)


@pytest.mark.parametrize("defense", [FineTune(epochs=1), MMOM(steps=4)])
def test_a_repair_that_is_not_mmac_is_refused_at_once(look, poisoned, defense):
    parts = []
    with pytest.raises(UserError, match=rf"mmac must be an MMAC, such as MMAC\(steps=120\), got {type(defense).__name__}"):
        look(poisoned, mmac=defense, progress=parts.append)
    assert parts == []


def test_labels_can_be_int32_but_no_list(look, poisoned, found, clean, short):
    images, labels = clean
    settings = {"test": QUICK, "mmac": short, "mmom": MMOM(steps=4, check_every=2), "classes": NAMES}
    assert audit(poisoned, images, labels.int(), **settings).found == found.found
    with pytest.raises(UserError, match="labels must be a torch tensor, got list"):
        audit(poisoned, images, labels.tolist(), **settings)


def test_the_detector_has_the_settings_that_are_given_and_the_report_says_its_theta(look, poisoned, found):
    images, _ = quarters(40, seed=11)
    loose = look(poisoned, suspect_images=torch.cat([images, triggered(images[:20])]), detector={"theta": 0.25}, folds=3)
    assert loose.suspicious.flagged > found.suspicious.flagged
    assert loose.verdict.reasons[-1].endswith("; 25 % of clean images are by chance.")
    assert found.verdict.reasons[-1].endswith("; 0.5 % of clean images are by chance.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"theta": 5}, r"detector.theta must be in \(0, 1\), got 5"),
        ({"tetha": 0.1}, "unknown setting detector.tetha; did you mean 'theta'?"),
    ],
)
def test_wrong_settings_of_the_detector_are_told_at_once(look, poisoned, settings, message):
    parts = []
    with pytest.raises(UserError, match=message):
        look(poisoned, detector=settings, progress=parts.append)
    assert parts == []


@pytest.mark.parametrize("test", [reach, warp_reach])
def test_images_of_one_class_are_not_enough(test, poisoned, clean):
    with pytest.raises(UserError, match="all clean images are of class 0: an audit needs images of other classes"):
        test(poisoned, clean[0][:6], torch.zeros(6, dtype=torch.long))


# -- what the findings mean, by counts made up here ---------------------------------------------------------------------------

SAME = Paired(3, 3, 500)
GAINS = Paired(40, 5, 500)


def findings(**settings):
    made = {
        "images": 500, "classes": 10, "accuracy": 0.93, "mmom": SAME, "mmac": Paired(2, 9, 500), "suspect": SAME, "changed": 14,
        "changed_from": [1, 0, 0, 0, 0, 0, 0, 0, 3, 10], "changed_to": [2, 2, 2, 2, 2, 1, 1, 1, 1, 0], "smallest_class": 50,
        "largest_class": 50,
    } | settings  # fmt: skip
    return Findings(**made)


def statistics_with(largest, *, at=9):
    statistics = torch.tensor([5.0, 4.2, 6.1, 5.5, 4.8, 5.9, 6.4, 5.2, 6.6, 5.8])
    statistics[at] = largest
    return MaximumMarginTest(seed=0).judge(statistics)


UNDONE, UNMOVED = statistics_with(4.0), statistics_with(5.8)
CLASSES = tuple(f"c{number}" for number in range(10))


def test_a_class_within_reach_looks_poisoned_and_two_tests_make_it_sure():
    verdict = judge(findings(), statistics_with(60.0), statistics_with(40.0), UNMOVED, UNDONE, CLASSES)
    assert (verdict.kind, verdict.target, verdict.suspicious) == ("poisoned", "c9", True)
    assert verdict.headline.startswith('looks poisoned (target class "c9", p = 0.000')
    assert verdict.confidence == "high: two tests agree"
    assert not verdict.against
    alone = judge(findings(), statistics_with(6.0), statistics_with(40.0), UNMOVED, UNDONE, CLASSES)
    assert alone.kind == "poisoned"
    assert alone.confidence == "moderate: one test of three"
    assert any("MM-BD finds nothing" in line for line in alone.against)


def test_a_class_that_stands_first_under_the_bounds_too_is_no_case_for_bounds():
    undone = judge(findings(), statistics_with(60.0), statistics_with(40.0), UNMOVED, UNDONE, CLASSES)
    assert any(
        'the steps take "c9" to 4.0, the furthest of the others to 6.6 logits: it stands no longer first' in line
        for line in undone.reasons
    )
    assert any("flagged images show the trigger" in line for line in undone.advice)
    left = judge(findings(), statistics_with(60.0), statistics_with(40.0), UNMOVED, statistics_with(7.0), CLASSES)
    assert any(
        'the steps take "c9" to 7.0, the furthest of the others to 6.6 logits: it stands first' in line for line in left.reasons
    )
    assert any("Bounds may not undo this trigger" in line for line in left.advice)
    assert not any("flagged images show the trigger" in line for line in left.advice)


def test_a_class_that_a_warp_leads_to_looks_poisoned():
    warps = judge(findings(), statistics_with(6.0), statistics_with(6.0), statistics_with(40.0, at=4), UNDONE, CLASSES)
    assert (warps.kind, warps.target, warps.confidence) == ("poisoned", "c4", "moderate: one test of three")
    assert any(
        'warp, the same for all images, takes them furthest towards "c4": their mean margin grows by 40.0, next 6.6' in line
        for line in warps.reasons
    )
    assert any(
        'a warp raises the margin of "c4" by 4.8, the furthest of the others by 6.6 logits: it stands no longer first' in line
        for line in warps.reasons
    )
    assert any("defense.detector.rule=repaired" in line for line in warps.advice)
    both = judge(findings(), statistics_with(6.0), statistics_with(40.0), statistics_with(40.0), UNDONE, CLASSES)
    assert not any("defense.detector.rule=repaired" in line for line in both.advice)
    assert both.confidence == "high: two tests agree"
    apart = judge(findings(), statistics_with(6.0), statistics_with(40.0), statistics_with(60.0, at=4), UNDONE, CLASSES)
    assert any('Small steps and a warp accuse different classes, "c9" and "c4"' in line for line in apart.against)


def test_mm_bd_alone_accuses_nobody():
    verdict = judge(findings(), statistics_with(60.0, at=3), statistics_with(6.0), UNMOVED, UNDONE, CLASSES)
    assert verdict.kind == "nothing"
    assert any('MM-BD accuses another class, "c3"' in line for line in verdict.against)
    assert "no clean bill" in verdict.confidence


def test_a_gain_of_the_repair_for_imbalance_looks_imbalanced():
    verdict = judge(findings(mmom=GAINS), statistics_with(6.0), statistics_with(6.0), UNMOVED, UNDONE, CLASSES)
    assert (verdict.kind, verdict.target) == ("imbalanced", None)
    assert "gains 7.0 points" in verdict.headline


def test_a_common_class_is_within_reach_too():
    common = findings(mmom=GAINS, suspect=Paired(40, 2, 500))
    explained = judge(common, statistics_with(6.0), statistics_with(40.0), UNMOVED, UNDONE, CLASSES)
    assert explained.kind == "imbalanced"
    assert any("imbalance explains as well" in line for line in explained.against)


def test_a_model_can_look_poisoned_and_imbalanced():
    rare = judge(findings(mmom=GAINS, suspect=SAME), statistics_with(6.0), statistics_with(40.0), UNMOVED, UNDONE, CLASSES)
    assert rare.kind == "poisoned"
    common = findings(mmom=GAINS, suspect=Paired(40, 2, 500))
    both = judge(common, statistics_with(60.0), statistics_with(40.0), UNMOVED, UNDONE, CLASSES)
    assert (both.kind, both.target) == ("poisoned", "c9")
    assert both.headline.endswith("and imbalanced (a repair gains 7.0 points)")
    assert both.confidence == "moderate: two tests agree, and imbalance may explain a part"
    assert any("defense=mmom" in line for line in both.advice)
    elsewhere = judge(common, statistics_with(60.0, at=3), statistics_with(40.0), UNMOVED, UNDONE, CLASSES)
    assert elsewhere.kind == "imbalanced"


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"classes": 4}, "With 4 classes"),
        ({"smallest_class": 5}, "only 5 clean images"),
        ({"largest_class": 500}, "unevenly spread"),
        ({"accuracy": 0.2}, "decided wrongly"),
    ],
)
def test_what_weakens_a_verdict_is_said(settings, part):
    verdict = judge(findings(**settings), statistics_with(6.0), statistics_with(6.0), UNMOVED, UNDONE, CLASSES)
    assert any(part in line for line in verdict.against)


def test_reliability_is_of_the_models_probabilities(found, poisoned, clean):
    images, labels = clean
    confidence, decisions = poisoned(images).softmax(1).max(1)
    bins = found.tensors["reliability"]
    assert int(bins[:, 0].sum()) == len(images)
    filled = bins[:, 0] > 0
    assert float((bins[filled, 0] * bins[filled, 1]).sum()) == pytest.approx(float(confidence.sum()), rel=1e-4)
    assert float((bins[filled, 0] * bins[filled, 2]).sum()) == pytest.approx(float((decisions == labels).sum()))


def test_classes_that_cannot_be_divided_are_told_before_anything_is_searched(honest, clean, monkeypatch):
    monkeypatch.setattr(MaximumMarginTest, "search", lambda *_, **__: pytest.fail("a search ran"))
    images, labels = clean
    kept = torch.cat([(labels != 3).nonzero().flatten(), (labels == 3).nonzero().flatten()[:1]])
    with pytest.raises(UserError, match="needs at least 2 of every class: class '3' has 1"):
        audit(honest, images[kept], labels[kept])
    with pytest.raises(UserError, match="at least 2 folds, got 1"):
        audit(honest, images, labels, folds=1)


def test_classes_out_of_reach_are_judged_by_their_spread(honest, clean):
    found = reach(honest, *clean, steps=1)
    assert found.statistics.min() < 0
    assert found.suspect == int(found.statistics.argmax())
    assert found.p_value == pytest.approx(MaximumMarginTest().judge_signed(found.statistics).p_value, abs=1e-3)
    assert not found.detected
