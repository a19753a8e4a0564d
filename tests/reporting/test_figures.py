"""The figures of a run folder, and the numbers in them against slow or independent versions."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from marginclip.errors import UserError
from marginclip.reporting import area_under, draw_figures, roc_curve
from marginclip.reporting.activations import activation_figures, spread
from marginclip.reporting.detection import detection_figures
from marginclip.reporting.examples import amplification, example_figures
from marginclip.reporting.inverted import inverted_figures
from marginclip.reporting.learning import learning_figures
from marginclip.reporting.margins import margin_figures


@pytest.fixture
def record_of(make_record):
    """Makes a record with a detector and a history."""
    history = [{"agreement": 1.0, "data": 0.1, "mean_margin": 3.0, "lambda": 0.1, "active_bounds": 0.2}] * 3
    return partial(make_record, classes=list("abc"), detector={"threshold": 1.5}, history=history)


def arrays_of(*, attack: bool = True, leaky: bool = False, num_sites: int = 5, channels: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {"scores/mmdf_clean": random.normal(0, 1, 60)}
    if attack:
        clean = random.random((2, channels, 8, 8))
        arrays |= {"scores/mmdf_triggered": random.normal(2, 1, 50)}
        arrays |= {"examples/clean": clean, "examples/triggered": 0.9 * clean, "examples/labels": np.array([0, 7])}
        arrays |= {"examples/targets": np.array([1, 1])}
    for number in range(num_sites):
        site, highest = f"activations/{number:03d}_relu", random.random(6)
        arrays |= {f"{site}/clean_max": highest, f"{site}/clean_min": -0.1 * highest * leaky, f"{site}/upper": highest / 2}
        if leaky:
            arrays[f"{site}/lower"] = -0.05 * highest
        if attack:
            arrays |= {f"{site}/triggered_max": 2 * highest, f"{site}/triggered_min": -0.2 * highest * leaky}
    return arrays


# -- the folder ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (True, ["examples.png", "activations.png", "detection_mmdf.png", "learning.png"]),
        (False, ["activations.png", "detection_mmdf.png", "learning.png"]),
    ],
)
def test_a_folder_gives_whole_pngs_and_nothing_else(
    attack: bool, expected: list[str], record_of, save_run, tmp_path: Path
) -> None:
    paths = draw_figures(save_run(tmp_path / "run", record_of(), arrays_of(attack=attack)))
    assert [path.name for path in paths] == expected
    assert sorted(path.name for path in (tmp_path / "run" / "figures").iterdir()) == sorted(expected)
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.read_bytes()[-8:-4] == b"IEND" for path in paths)


def test_drawing_leaves_pyplot_alone(record_of, save_run, tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    draw_figures(save_run(tmp_path, record_of(), {"scores/mmdf_clean": np.arange(3.0)}))
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_what_is_missing_is_left_out(make_record, save_run, tmp_path: Path) -> None:
    assert draw_figures(save_run(tmp_path, make_record())) == []
    failed = make_record(status="failed")
    assert [path.name for path in draw_figures(save_run(tmp_path, failed, {"scores/mmdf_clean": np.zeros(4)}))] == [
        "detection_mmdf.png"
    ]


def test_arrays_of_an_earlier_run_in_the_folder_are_left_out(make_record, save_run, tmp_path: Path) -> None:
    arrays = {"scores/mmdf_clean": np.zeros(4), "confusion/none": np.eye(3), "reliability/none": np.ones((15, 3))}
    assert draw_figures(save_run(tmp_path, make_record(status="failed", rows={}, repaired_row=None), arrays)) == []


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_no_readable_record_is_an_error_of_the_user(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json"):
        draw_figures(tmp_path)


def test_half_precision_arrays_are_read(record_of, save_run, tmp_path: Path) -> None:
    save_run(tmp_path, record_of(history=[]))
    save_file({"scores/mmdf_clean": torch.arange(5.0).bfloat16()}, tmp_path / "arrays.safetensors")
    assert [path.name for path in draw_figures(tmp_path)] == ["detection_mmdf.png"]


# -- detection ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_area_is_the_rank_sum_and_the_curve_that_of_sklearn(levels: int) -> None:
    random = np.random.default_rng(levels)
    clean, triggered = random.integers(0, levels, 40) / 1.0, random.integers(levels // 3, levels + 2, 30) / 1.0
    wins = [(t > c) + 0.5 * (t == c) for t in triggered for c in clean]
    scores, kinds = np.concatenate([clean, triggered]), np.repeat([0, 1], [40, 30])
    rates = roc_curve(clean, triggered)
    assert area_under(*rates) == pytest.approx(np.mean(wins)) == pytest.approx(roc_auc_score(kinds, scores))
    reference = sklearn_roc_curve(kinds, scores, drop_intermediate=False)
    assert np.allclose(rates[0], reference[0])
    assert np.allclose(rates[1], reference[1])


@pytest.mark.parametrize(("clean", "triggered", "area"), [([0, 1], [2, 3], 1.0), ([2, 3], [0, 1], 0.0), ([5, 5], [5], 0.5)])
def test_area_of_extreme_cases(clean: list[float], triggered: list[float], area: float) -> None:
    assert area_under(*roc_curve(np.array(clean), np.array(triggered))) == area


def test_a_curve_needs_scores_of_both_kinds() -> None:
    with pytest.raises(ValueError, match="0 triggered"):
        roc_curve(np.zeros(3), np.empty(0))


@pytest.mark.parametrize(("detector", "lines"), [({"threshold": 2.0}, [2.0]), ({"threshold": None}, []), (None, [])])
def test_a_threshold_is_drawn_where_there_is_one(detector: dict | None, lines: list[float], record_of) -> None:
    axes = detection_figures(record_of(detector=detector), arrays_of())["detection_mmdf"].axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == lines


def test_detection_figure_of_each_detector_with_its_panels(record_of) -> None:
    arrays = {"scores/a_clean": np.arange(9.0), "scores/a_triggered": np.arange(5.0, 9.0), "scores/b_clean": np.ones(4)}
    rows = {row: {"label": row.upper()} for row in ("none", "a", "b")}
    figures = detection_figures(record_of(rows=rows), arrays)
    assert {name: len(figure.axes) for name, figure in figures.items()} == {"detection_a": 2, "detection_b": 1}
    assert figures["detection_a"].axes[1].get_title() == "ROC curve, AUC 0.778"  # 28 of 36 pairs, ties counting one half
    assert figures["detection_b"].get_suptitle() == "Detection by B: digits, small_resnet, badnet all2one"


def test_histograms_are_shares_of_their_own_kind(record_of) -> None:
    axes = detection_figures(record_of(), arrays_of())["detection_mmdf"].axes[0]
    assert [patch.get_data().values.sum() for patch in axes.patches] == pytest.approx([100, 100])
    assert axes.lines[0].get_xdata()[0] == 1.5


# -- activations --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (7, [0, 2, 4, 6]), (17, [0, 5, 11, 16])]
)
def test_chosen_sites_are_spread_over_depth(count: int, chosen: list[int]) -> None:
    assert spread([f"{number:03d}" for number in range(count)]) == [f"{number:03d}" for number in chosen]


@pytest.mark.parametrize(("attack", "leaky", "lines"), [(True, False, 3), (False, False, 2), (True, True, 6), (False, True, 4)])
def test_minima_and_triggered_images_are_drawn_where_there_are_any(attack: bool, leaky: bool, lines: int, record_of) -> None:
    figure = activation_figures(record_of(), arrays_of(attack=attack, leaky=leaky))["activations"]
    assert [len(axes.lines) for axes in figure.axes] == [lines] * 4
    assert len(figure.legends[0].get_texts()) == lines


def test_feature_maps_are_sorted_by_the_clean_maximum_together(record_of) -> None:
    arrays = arrays_of(num_sites=1)
    axes = activation_figures(record_of(), arrays)["activations"].axes[0]
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
    ordered = np.sort(arrays["activations/000_relu/clean_max"])
    assert np.allclose(drawn["maximum, clean images"], ordered)
    assert np.allclose(drawn["maximum, triggered images"], 2 * ordered)
    assert np.allclose(drawn["learned upper bound"], ordered / 2)


# -- examples -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("largest", "factor"), [(0.0, 1), (1.0, 1), (0.9, 1.1), (0.1, 10), (3 / 255, 85), (1 / 255, 250)])
def test_amplification_nearly_fills_the_range(largest: float, factor: float) -> None:
    assert amplification(largest) == pytest.approx(factor)
    assert largest == 0 or 0.9 <= amplification(largest) * largest <= 1 + 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_have_three_rows_and_class_names(channels: int, record_of) -> None:
    arrays = arrays_of(channels=channels)
    arrays["examples/triggered"] = np.clip(arrays["examples/clean"] - 0.1, 0, 1)
    axes = example_figures(record_of(), arrays)["examples"].axes
    assert [each.get_ylabel() for each in axes[::2]] == ["clean", "triggered", "|difference|\n\N{MULTIPLICATION SIGN} 10"]
    assert [each.get_title() for each in axes[:2]] == ["a\n→ b", "7\n→ b"]


def test_at_most_eight_examples_are_drawn_and_odd_channels_are_left_out(record_of) -> None:
    images = np.random.default_rng(0).random((11, 3, 4, 4))
    figure = example_figures(record_of(), {"examples/clean": images, "examples/triggered": images})["examples"]
    assert len(figure.axes) == 24
    assert example_figures(record_of(), {"examples/clean": images[:, :2], "examples/triggered": images[:, :2]}) == {}


# -- learning -----------------------------------------------------------------------------------------------------------------


def test_learning_has_a_panel_for_each_quantity_that_has_values(record_of) -> None:
    axes = learning_figures(record_of(), {})["learning"].axes
    assert len(axes) == 5  # no check has max_margin
    assert list(axes[0].lines[0].get_ydata()) == [100, 100, 100]


@pytest.mark.parametrize(("values", "scale"), [([0.1, 0.3], "linear"), ([0.1, 1.5], "log"), ([0.0, 5.0], "linear")])
def test_lambda_is_on_a_log_scale_only_over_a_decade(values: list[float], scale: str, record_of) -> None:
    history = [{"lambda": value} for value in values]
    assert learning_figures(record_of(history=history), {})["learning"].axes[0].get_yscale() == scale


@pytest.mark.parametrize("history", [[], [{}], [{"loss": 1.0}]])
def test_no_history_no_figure(history: list, record_of) -> None:
    assert learning_figures(record_of(history=history), {}) == {}


# -- maximum margins ----------------------------------------------------------------------------------------------------------


def test_maximum_margins_are_the_bars_and_the_suspect_stands_out(record_of) -> None:
    found = {"statistics": [3.0, -1.0, 40.0], "suspect": 2, "true_target": 2, "detected": True, "p_value": 1e-4}
    found |= {"test": "mmbd", "uncalibrated_p_value": 1e-4, "alpha": 0.05, "shape": 1.0, "scale": 1.0}
    (axes,) = margin_figures(record_of(detection=found), {})["maximum_margins"].axes
    assert [bar.get_height() for bar in axes.patches] == found["statistics"]
    assert [bar.get_hatch() for bar in axes.patches] == [None, None, "//"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert axes.get_title() == "backdoor detected, p = 0.0001"
    assert margin_figures(record_of(), {}) == {}
    many = found | {"statistics": list(range(200)), "suspect": 199, "true_target": None, "detected": False}
    assert "not detected" in margin_figures(record_of(detection=many), {})["maximum_margins"].axes[0].get_title()


# -- inverted triggers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_inverted_triggers_are_drawn_as_they_are_used(channels: int, record_of) -> None:
    random = np.random.default_rng(0)
    masks, patterns = 0.3 * random.random((2, 1, 6, 6)), random.random((2, channels, 6, 6))
    arrays = {"inverted/masks": masks, "inverted/patterns": patterns, "inverted/classes": np.array([2, 0])}
    axes = inverted_figures(record_of(findings={"suspects": [0]}), arrays)["inverted_trigger"].axes
    pictures = [each.images[0] for each in axes]
    assert all(picture.get_clim() == (0, 1) for picture in pictures)  # a mask of 0.3 is not stretched to 1
    assert np.allclose(pictures[0].get_array(), masks[0, 0])
    assert np.allclose(np.atleast_3d(np.asarray(pictures[3].get_array())).transpose(2, 0, 1), masks[1] * patterns[1])
    assert [axes[0].get_title(), axes[1].get_title()] == [
        f"c\n|m| = {masks[0].sum():.1f}",
        f"a (suspect)\n|m| = {masks[1].sum():.1f}",
    ]
    assert inverted_figures(record_of(), {}) == {}
