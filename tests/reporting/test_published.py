"""Tables of the paper beside ours: the paper's figures, means and standard errors, and paired tests, each worked out here."""

import statistics

import numpy as np
import pytest
from scipy.stats import permutation_test

from marginclip.errors import UserError
from marginclip.reporting.__main__ import main
from marginclip.reporting.published import Cell, Figure, published, published_table, sign_flip_p

METHODS = {"mmac": "MMAC", "mmdf": "MMDF", "nad": "NAD"}


@pytest.fixture
def run(make_record):
    """A run of a defense on the victim of a seed, by the ACC and ASR of its rows."""

    def make(seed, rows, *, attack="badnet", status="done", beta=None):
        labels = {"none": {"label": "no defense"}} | {row: {"label": METHODS[row]} for row in rows}
        metrics = {"none": {"acc": 0.95, "asr": 1.0}} | {row: {"acc": acc, "asr": asr} for row, (acc, asr) in rows.items()}
        groups = {"attack": {"name": attack} | ({} if beta is None else {"beta": beta}), "dataset": {"name": "cifar10"}}
        victim = {"folder": f"{attack}-{seed}", "trained_now": False}
        return make_record(config=groups, seed=seed, status=status, rows=labels, metrics=metrics, victim=victim)

    return make


def lines(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(
    ("table", "key", "figure"),
    [
        ("table1", (Cell("", "chessboard", "all2one", ""), "mmac", "ASR"), Figure(26.19, 36.49)),
        ("table1", (Cell("", "none", "-", ""), "mmdf", "ACC"), Figure(88.99, 0.45)),
        ("table3", (Cell("", "adaptive", "all2one", "0.5"), "mmac", "ASR"), Figure(2.48, None)),
        ("table4", (Cell("gtsrb", "chessboard", "all2one", ""), "mmdf", "ASR"), Figure(17.95, 31.03)),
        ("table5", (Cell("", "blend", "all2all", ""), "none", "PACC"), Figure(0.05, 0.04)),
    ],
)
def test_figures_are_those_of_the_paper(table, key, figure):
    assert published(table)[key] == figure


def test_every_table_is_whole():
    """Table 1 has eight methods, six attacks and three metrics, and for all but one method the ACC without an attack; and so on."""
    assert {name: len(published(name)) for name in ("table1", "table3", "table4", "table5")} == {
        "table1": 8 * 6 * 3 + 7, "table3": 3 * 4 * 2, "table4": 3 * (6 * 3 + 3), "table5": 3 * 6 * 3,
    }  # fmt: skip


def test_ours_stands_beside_the_papers_with_its_standard_error(run):
    accuracies, rates = [0.90, 0.92, 0.97], [0.01, 0.03, 0.08]
    runs = [run(seed, {"mmac": pair}) for seed, pair in enumerate(zip(accuracies, rates, strict=True))]
    found = {row[1]: row for row in lines(published_table("table1", runs)) if row[0] == "badnet all2one"}
    error = 100 * statistics.stdev(accuracies) / 3**0.5
    assert found["MMAC"][2:4] == ["3", f"93.0 ± {error:.1f} (88.4, +4.6)"]
    assert found["MMAC"][4].endswith("(2.2, +1.8)")
    assert found["MMAC"][5] == "- (83.6)"
    assert found["no defense"][2:4] == ["3", "95.0 ± 0.0 (91.6, +3.4)"]
    assert found["ibau"][2:] == ["0", "- (89.7)", "- (2.5)", "- (85.5)"]


def test_the_model_as_given_counts_once_however_many_methods_were_run(run):
    runs = [run(0, {"mmac": (0.9, 0.1)}), run(0, {"nad": (0.8, 0.2)})]
    found = {row[1]: row for row in lines(published_table("table1", runs)) if row[0] == "badnet all2one"}
    assert found["no defense"][2:4] == ["1", "95.0 (91.6, +3.4)"]


def test_methods_are_compared_on_shared_victims_alone(run):
    ours, others = [0.93, 0.91, 0.94], [0.90, 0.91, 0.88, 0.5]
    runs = [run(seed, {"mmdf": (acc, 0.0)}) for seed, acc in enumerate(ours)]
    runs += [run(seed, {"nad": (acc, 0.1 * seed)}) for seed, acc in enumerate(others)]
    (row,) = [row for row in lines(published_table("table1", runs)) if row[0] == "nad"]
    gaps = [100 * (one - other) for one, other in zip(others[:3], ours, strict=True)]
    assert row == ["nad", "badnet all2one", "3", f"-3.0 (p = {sign_flip_p(gaps):.3f})", "+10.0 (p = 0.500)"]


def test_all_attacks_are_tested_together_too(run):
    runs = [run(seed, {"mmdf": (0.9, 0.0)}, attack=attack) for seed in (0, 1) for attack in ("badnet", "blend")]
    runs += [run(seed, {"nad": (0.8, 0.2)}, attack=attack) for seed in (0, 1) for attack in ("badnet", "blend")]
    found = {row[1]: row[2:] for row in lines(published_table("table1", runs)) if row[0] == "nad"}
    assert found["all"] == ["4", "-10.0 (p = 0.125)", "+20.0 (p = 0.125)"]
    assert found["badnet all2one"] == ["2", "-10.0 (p = 0.500)", "+20.0 (p = 0.500)"]


@pytest.mark.parametrize("count", [3, 6, 10])
def test_p_is_that_of_a_permutation_test(count):
    differences = np.random.default_rng(count).normal(0.5, 1.0, count)
    pairs = (differences, np.zeros(count))
    wanted = permutation_test(pairs, lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True)
    assert sign_flip_p(list(differences)) == pytest.approx(wanted.pvalue)


def test_p_of_many_differences_is_near_that_of_a_t_test():
    differences = np.random.default_rng(0).normal(0.3, 1.0, 40)
    score = differences.mean() / (differences.std(ddof=1) / 40**0.5)
    assert sign_flip_p(list(differences)) == pytest.approx(2 * statistics.NormalDist().cdf(-abs(score)), abs=0.02)
    assert sign_flip_p([1.0] * 30) < 1e-3


def test_failed_attacks_are_named_and_not_counted(run):
    text = published_table("table1", [run(0, {"mmac": (0.9, 0.1)}), run(1, {"mmac": (0.1, 0.9)}, status="attack_failed")])
    assert "- badnet all2one, seed 1: attack failed" in text
    assert next(row for row in lines(text) if row[:2] == ["badnet all2one", "MMAC"])[2] == "1"


def test_unfinished_runs_are_not_counted(run):
    text = published_table("table1", [run(0, {"mmac": (0.9, 0.1)}), run(1, {"mmac": (0.1, 0.9)}, status="running")])
    assert next(row for row in lines(text) if row[:2] == ["badnet all2one", "MMAC"])[2:4] == ["1", "90.0 (88.4, +1.6)"]
    assert "- badnet all2one, seed 1: not finished" in text


def test_one_victim_under_two_paths_is_one(run):
    runs = [run(0, {"mmac": (0.9, 0.1)}), run(0, {"nad": (0.8, 0.2)})]
    runs[1].victim.folder = f"/somewhere/else/{runs[1].victim.folder}"
    assert next(row for row in lines(published_table("table1", runs)) if row[1] == "no defense")[2] == "1"


def test_runs_of_other_settings_in_one_row_are_told(run):
    runs = [run(seed, {"mmac": (0.9, 0.1)}) for seed in range(2)]
    assert "Mixed settings" not in published_table("table1", runs)
    runs[1].identity["model"] = {"name": "resnet18", "width": 64}
    assert "badnet all2one mmac: the means are over runs that differ in model" in published_table("table1", runs)


def test_cells_of_ours_that_the_paper_lacks_are_shown(run):
    text = published_table("table3", [run(0, {"mmac": (0.9, 0.1)}, attack="adaptive", beta=2)])
    assert next(row for row in lines(text) if row[:2] == ["adaptive all2one beta 2", "MMAC"])[3] == "90.0"


def test_the_command_prints_a_table_and_refuses_an_unknown_one(save_run, make_record, capsys, tmp_path):
    save_run(tmp_path / "one", make_record(metrics={"none": {"acc": 0.9}, "mmac": {"acc": 0.8}}))
    assert main([str(tmp_path), "--published", "table5"]) == 0
    assert capsys.readouterr().out.startswith("# Table 5 of the first paper")
    assert main([str(tmp_path), "--published", "table2"]) == 1
    assert "'table2' is no table of the paper" in capsys.readouterr().err


def test_unknown_tables_are_one_sentence():
    with pytest.raises(UserError, match=r"'table7' is no table of the paper.* \(there are table1, table3, table4, table5\)"):
        published("table7")
