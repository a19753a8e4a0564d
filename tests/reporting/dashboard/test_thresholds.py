"""Counts at other thresholds against loops over images."""

import numpy as np
import pytest

from marginclip.reporting.dashboard.thresholds import detections, flagged_at, holds_at, roc


@pytest.fixture
def drawn():
    generator = np.random.default_rng(0)
    scores = {
        kind: generator.normal(mean, 2, 300).round(1).astype(np.float32) for kind, mean in (("clean", 0), ("triggered", 3))
    }
    codes = {
        key: generator.integers(0, 4, 300).astype(np.float32)
        for key in ("clean_correct", "triggered_success", "triggered_restored")
    }
    arrays = {f"scores/mmdf_{kind}": values for kind, values in scores.items()}
    return scores, codes, arrays | {f"outcomes/mmdf/{key}": values for key, values in codes.items()}


def test_counts_at_every_threshold_are_those_of_a_loop(drawn, make_record):
    scores, codes, arrays = drawn
    (found,) = detections(make_record(detector={"threshold": 2.3456789}), arrays)
    assert found["thresholds"] == sorted(found["thresholds"])
    assert found["thresholds"][found["at"]] == 2.3456789
    kinds = {"correct": "clean_correct", "success": "triggered_success", "restored": "triggered_restored"}
    for number, threshold in enumerate(found["thresholds"]):
        assert found["false"][number] == sum(score >= threshold for score in scores["clean"].tolist())
        assert found["true"][number] == sum(score >= threshold for score in scores["triggered"].tolist())
        for name, key in kinds.items():
            pairs = zip(scores[key.partition("_")[0]].tolist(), codes[key].astype(int).tolist(), strict=True)
            assert found[name][number] == sum((code >> 1) & 1 if score >= threshold else code & 1 for score, code in pairs)
    assert found["false"][0] == 300 and found["false"][-1] == found["true"][-1] == 0
    assert sum(found["histogram"]["clean"]) == 300


def test_images_that_are_always_flagged_count_at_any_threshold():
    scores, always = np.array([0.0, 1.0, 2.0]), np.array([True, False, False])
    assert flagged_at(scores, np.array([-1.0, 1.0, 3.0]), always).tolist() == [3, 3, 1]
    assert flagged_at(scores, np.array([-1.0, 1.0, 3.0])).tolist() == [3, 2, 0]
    assert holds_at(scores, np.array([4 + 3, 1, 2]), np.array([-1.0, 1.0, 2.0, 3.0])).tolist() == [2, 2, 3, 2]


def test_records_of_older_versions_have_no_outcomes_and_clean_runs_no_triggered_images(drawn, make_record):
    _, _, arrays = drawn
    scores = {name: values for name, values in arrays.items() if name.startswith("scores/")}
    (old,) = detections(make_record(detector={"threshold": None}), scores)
    assert (old["at"], old["correct"], old["success"]) == (None, None, None)
    (clean,) = detections(make_record(detector={"threshold": 1.0}), {"scores/mmdf_clean": scores["scores/mmdf_clean"]})
    assert clean["true"] is None and roc(clean) is None
    assert detections(make_record(), {}) == []


def test_roc_points_are_few_exact_and_hold_the_runs_own(drawn, make_record):
    scores, _, arrays = drawn
    (found,) = detections(make_record(detector={"threshold": 2.3456789}), arrays)
    points = roc(found)
    assert len(points) <= 41 and points[0][1:] == [1, 1] and points[-1][1:] == [0, 0]
    assert 2.3456789 in [threshold for threshold, _, _ in points]
    for threshold, false, true in points:
        assert false == pytest.approx(np.mean(scores["clean"].astype(float) >= threshold), abs=1e-5)
        assert true == pytest.approx(np.mean(scores["triggered"].astype(float) >= threshold), abs=1e-5)
