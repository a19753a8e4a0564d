"""Figures of every class, within a run and across runs, against numbers put into the records by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from marginclip.reporting import draw_figures
from marginclip.reporting.__main__ import main
from marginclip.reporting.classes import MAX_BARS, class_figures
from marginclip.reporting.comparisons import lambda_figure, over_training_figure, sweeps
from marginclip.reporting.confusion import confusion_figures, shares
from marginclip.reporting.reliability import calibration_error, reliability_figures

BEFORE, AFTER = [0.9, 0.6, 0.3], [0.8, 0.7, 0.6]


ROWS = {"none": {"label": "no defense"}, "mmom": {"label": "MMOM", "phases": ["repair"]}}


@pytest.fixture
def record_of(make_record):
    """Makes the record of an imbalanced run; groups of its configuration can be changed, and fields."""

    def make(*, epochs=200, initial=1e-5, before=BEFORE, after=AFTER, counts=(500, 50, 5), config=None, **fields):
        settings = {
            "dataset": {"name": "cifar10"},
            "model": {"name": "resnet32"},
            "attack": {"name": "none"},
            "imbalance": {"name": "exponential", "ratio": 100},
            "training": {"epochs": epochs},
            "defense": {"name": "mmom", "lambda_": {"initial": initial}},
        }
        per_class = {"none": before} | ({} if after is None else {"mmom": after})
        metrics = {row: {"acc": float(np.mean([value or 0.0 for value in each]))} for row, each in per_class.items()}
        content = {"rows": ROWS, "repaired_row": "mmom", "per_class": per_class, "metrics": metrics, "clean_set_size": 500}
        content |= {"classes": ["cat", "dog", "ox"], "training_counts": None if counts is None else list(counts)}
        return make_record(config=settings | (config or {}), **(content | fields))

    return make


def arrays_of() -> dict[str, np.ndarray]:
    confusion = np.array([[9, 1, 0], [2, 6, 2], [3, 4, 3]])
    bins = np.full((15, 3), np.nan)
    bins[:, 0] = 0
    bins[7], bins[14] = (10, 0.5, 0.3), (30, 0.98, 0.88)
    arrays = {"confusion/none": confusion, "confusion/mmom": np.eye(3) * 10, "reliability/none": bins, "reliability/mmom": bins}
    return {name: values.astype(np.float32) for name, values in arrays.items()}


# -- one run ------------------------------------------------------------------------------------------------------------------


def test_a_run_folder_gives_the_three_figures(record_of, save_run, tmp_path: Path) -> None:
    paths = draw_figures(save_run(tmp_path / "run", record_of(), arrays_of()))
    assert [path.name for path in paths] == ["class_accuracy.png", "confusion.png", "reliability.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_bars_before_and_after_and_the_training_images_on_their_own_axis(record_of) -> None:
    axes, right = class_figures(record_of(), {})["class_accuracy"].axes
    before, after = axes.containers
    assert [bar.get_height() for bar in before] == pytest.approx([90, 60, 30])
    assert [bar.get_height() for bar in after] == pytest.approx([80, 70, 60])
    assert (before.get_label(), after.get_label()) == ("no defense (mean 60.0 %)", "MMOM (mean 70.0 %)")
    assert list(right.lines[0].get_ydata()) == [500, 50, 5]
    assert right.get_yscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cat", "dog", "ox"]


def test_balanced_runs_have_no_counts_and_a_run_without_repair_one_colour(record_of) -> None:
    figure = class_figures(record_of(after=None, counts=None), {})["class_accuracy"]
    assert len(figure.axes) == len(figure.axes[0].containers) == 1


def test_a_class_without_test_images_has_no_bar_and_no_part_in_the_mean(record_of) -> None:
    (axes, _) = class_figures(record_of(before=[0.5, None, 0.7]), {})["class_accuracy"].axes
    assert np.isnan(axes.containers[0][1].get_height())
    assert axes.containers[0].get_label() == "no defense (mean 60.0 %)"
    assert class_figures(record_of(before=[None] * 3), {}) == {}


def test_counts_of_one_size_are_on_a_linear_axis(record_of) -> None:
    right = class_figures(record_of(counts=(500, 400, 300)), {})["class_accuracy"].axes[1]
    assert (right.get_yscale(), right.get_ylim()[0]) == ("linear", 0)


def test_many_classes_are_steps(record_of) -> None:
    num_classes = MAX_BARS
    record = record_of(before=[0.5] * num_classes, after=[0.6] * num_classes, counts=[10] * num_classes)
    axes = class_figures(record, {})["class_accuracy"].axes[0]
    assert len(axes.patches) == 0
    assert len(axes.lines) == 2


def test_a_run_that_measured_no_classes_gives_no_such_figure(record_of) -> None:
    record = record_of(per_class={})
    assert class_figures(record, {}) == confusion_figures(record, {}) == reliability_figures(record, {}) == {}


def test_confusion_is_in_percent_of_the_true_class(record_of) -> None:
    axes = confusion_figures(record_of(), arrays_of())["confusion"].axes
    assert np.allclose(axes[0].images[0].get_array(), [[90, 10, 0], [20, 60, 20], [30, 40, 30]])
    assert [each.get_title() for each in axes[:2]] == ["no defense: 60.0 % correct", "MMOM: 100.0 % correct"]
    assert (axes[0].get_ylabel(), axes[0].get_xlabel()) == ("true class", "decision")
    assert sorted(text.get_text() for text in axes[0].texts) == sorted(["90", "10", "20", "60", "20", "30", "40", "30"])
    assert np.isnan(shares(np.array([[0, 0], [1, 1]]))[0]).all()


def test_reliability_shows_accuracy_gap_error_and_share_of_images(record_of) -> None:
    axes = reliability_figures(record_of(), arrays_of())["reliability"].axes
    accuracy, gap = axes[0].containers
    assert [bar.get_height() for bar in accuracy] == pytest.approx([30, 88])
    assert [(bar.get_y(), bar.get_height()) for bar in gap] == [
        pytest.approx((30, 20), abs=1e-4),
        pytest.approx((88, 10), abs=1e-4),
    ]
    assert accuracy[1].get_x() + accuracy[1].get_width() == pytest.approx(100)
    assert axes[0].get_title() == "no defense: ECE 12.5 %"  # (10 x 0.2 + 30 x 0.1) / 40
    assert calibration_error(arrays_of()["reliability/none"]) == pytest.approx(0.125)
    assert [bar.get_height() for bar in axes[2].containers[0]] == pytest.approx([0] * 7 + [25] + [0] * 6 + [75])


# -- across runs --------------------------------------------------------------------------------------------------------------


def test_short_and_long_training_of_one_setting_side_by_side(record_of) -> None:
    records = [
        record_of(epochs=200),
        record_of(epochs=200, seed=1, before=[0.7, 0.6, 0.1]),
        record_of(epochs=500),
        record_of(epochs=1000, before=[1.0, 0.6, 0.0]),
        record_of(epochs=9, initial=1.0),  # another setting, with one number of epochs only
        record_of(epochs=7, status="failed"),
    ]
    found = sweeps(records, "epochs")
    assert [list(runs) for runs in found.values()] == [[200, 500, 1000]]
    before, after = over_training_figure(found).axes
    short, long = (container for container in before.containers if "epochs" in container.get_label())
    assert [bar.get_height() for bar in short] == pytest.approx([80, 60, 20])  # the mean of both seeds
    assert [bar.get_height() for bar in long] == pytest.approx([100, 60, 0])
    assert (short.get_label(), long.get_label()) == ("200 epochs (mean 53.3 %)", "1000 epochs (mean 53.3 %)")
    assert before.get_title().replace("\n", " ") == "no defense cifar10, resnet32, exponential 100, clean set of 500, λ = 1e-05"
    assert after.get_title().startswith("MMOM\n")


@pytest.mark.parametrize(
    "other",
    [
        {"imbalance": {"name": "exponential", "ratio": 10}},
        {"imbalance": {"name": "step", "ratio": 100}},
        {"imbalance": {"name": "none"}},
        {"loss": {"name": "mixup"}},
        {"defense": {"name": "mmom", "lambda_": {"initial": 0.1}}},
        {"defense": {"name": "other", "lambda_": {"initial": 1e-5}}},
        {"dataset": {"name": "cifar100"}},
    ],
)
def test_what_makes_another_setting(other: dict, record_of) -> None:
    assert len(sweeps([record_of(), record_of(epochs=1000)], "epochs")) == 1
    assert sweeps([record_of(), record_of(epochs=1000, config=other)], "epochs") == {}


def test_a_bar_for_each_lambda_in_the_order_of_size(record_of) -> None:
    values = {1e-3: 0.1, 0.0: 0.5, 1e-5: 0.9, 1e-4: 0.8}
    records = [record_of(initial=initial, after=[share] * 3) for initial, share in values.items()]
    (axes,) = lambda_figure(sweeps(records, "λ")).axes
    assert [container.get_label() for container in axes.containers] == [
        "λ = 0 (mean 50.0 %)", "λ = 1e-05 (mean 90.0 %)", "λ = 0.0001 (mean 80.0 %)", "λ = 0.001 (mean 10.0 %)"
    ]  # fmt: skip
    assert [round(bar.get_height()) for bar in axes.containers[1]] == [90] * 3
    assert [segment[0][1] for segment in axes.collections[-1].get_segments()] == pytest.approx([90, 60, 30])  # as given
    assert axes.get_title().replace("\n", " ") == "MMOM cifar10, resnet32, exponential 100, clean set of 500, 200 epochs"


def test_the_command_draws_both(record_of, save_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, settings in {"a": {}, "b": {"epochs": 1000}, "c": {"initial": 0.0}}.items():
        save_run(tmp_path / "runs" / name, record_of(**settings))
    over, lambdas = tmp_path / "figures" / "over.png", tmp_path / "lambdas.png"
    assert main([str(tmp_path / "runs"), "--over-training", str(over), "--lambdas", str(lambdas)]) == 0
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (over, lambdas))
    assert [line for line in capsys.readouterr().err.splitlines() if line.endswith(".png")] == [str(over), str(lambdas)]


@pytest.mark.parametrize(("option", "key"), [("--over-training", "training.epochs"), ("--lambdas", "defense.lambda_.initial")])
def test_what_no_record_serves_is_one_sentence(
    option: str, key: str, record_of, save_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = record_of(epochs=1000, initial=0.0, per_class={})
    for name, record in {"a": record_of(), "b": record_of(seed=1), "c": without}.items():
        save_run(tmp_path / "runs" / name, record)
    assert main([str(tmp_path / "runs"), option, str(tmp_path / "figure.png")]) == 1
    needed = f"error: {option} needs finished runs of one setting that differ in {key}, with per-class accuracy\n"
    assert capsys.readouterr().err == needed
    assert not (tmp_path / "figure.png").exists()
    assert main([str(tmp_path / "runs"), option, str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {option} must be a file, but '{tmp_path}' is a folder\n"
