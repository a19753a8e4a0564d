"""The summary of many runs, against means and deviations worked out here, and its command line."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from marginclip.record import RunRecord
from marginclip.reporting import load_records, summarise
from marginclip.reporting.__main__ import main


@pytest.fixture
def run(make_record):
    """Makes the record of a backdoored model's run; groups of its configuration can be changed, and its ``fields``."""

    def make(seed: int = 0, *, acc: float = 0.9, asr: float | None = 0.1, fields: dict | None = None, **config) -> RunRecord:
        mmac = {"acc": acc} if asr is None else {"acc": acc, "asr": asr}
        content = {"metrics": {"none": {"acc": 0.95, "asr": 1.0}, "mmac": mmac}, "seconds": {"repair": 10.0 + seed}}
        settings = {"defense": {"name": "mmac", "steps": 60, "fold_seed": seed}, "runs_dir": f"runs{seed}"}
        return make_record(config=settings | config, seed=seed, **(content | (fields or {})))

    return make


def rows(text: str) -> list[dict[str, str]]:
    """The rows of all tables of a Markdown text, by column."""
    found: list[dict[str, str]] = []
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif not cells[0].startswith("---"):
            found.append(dict(zip(header, cells, strict=True)))
    return found


def test_means_and_sample_deviations_over_seeds(run) -> None:
    accuracies, rates = [0.91, 0.93, 0.98], [0.0, 0.1, 0.5]
    text = summarise(run(seed, acc=acc, asr=asr) for seed, (acc, asr) in enumerate(zip(accuracies, rates, strict=True)))
    none, mmac = rows(text)
    assert (none["row"], mmac["row"], mmac["seeds"]) == ("no defense", "MMAC", "3")
    assert mmac["ACC %"] == f"{100 * sum(accuracies) / 3:.1f} ± {100 * statistics.stdev(accuracies):.1f}"
    assert mmac["ASR %"] == f"{100 * sum(rates) / 3:.1f} ± {100 * statistics.stdev(rates):.1f}"
    assert (mmac["TPR %"], mmac["seconds"], none["seconds"]) == ("-", "11.0 ± 1.0", "-")
    assert "Mixed" not in text
    assert "Left out" not in text


def test_one_seed_has_no_deviation(run) -> None:
    assert [row["ACC %"] for row in rows(summarise([run()]))] == ["95.0", "90.0"]


def test_missing_values_are_counted(run) -> None:
    mmac = rows(summarise([run(0, asr=0.2), run(1, asr=0.4), run(2, asr=None)]))[1]
    assert mmac["ASR %"] == "30.0 ± 14.1 (n=2)"


@pytest.mark.parametrize(("status", "reason"), [("attack_failed", "attack failed"), ("failed", "run failed")])
def test_failed_runs_are_named_and_in_no_mean(status: str, reason: str, run) -> None:
    fields = {"status": status} | ({"metrics": {}} if status == "failed" else {})
    bad = run(1, acc=0.0, asr=1.0, fields=fields).at(Path("runs/the-bad-one"))
    text = summarise([run(0), bad])
    assert rows(text) == rows(summarise([run(0)]))
    assert "Left out of the means (1)" in text
    assert "the-bad-one" in text
    assert f"seed 1: {reason}" in text


def test_a_group_of_failed_runs_alone_has_no_table(run) -> None:
    text = summarise([run(fields={"status": "attack_failed"})])
    assert rows(text) == []
    assert "(ASR without defense 100.0 %)" in text


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": {"name": "cifar10"}},
        {"model": {"name": "small_resnet", "width": 32, "activation": "relu"}},
        {"model": {"name": "small_resnet", "width": 16, "activation": "leaky_relu"}},
        {"attack": {"name": "blend", "rate": 0.1}},
        {"x2x": {"name": "all2all"}},
        {"defense": {"name": "mmbm", "steps": 60}},
        {"fields": {"clean_set_size": 1000}},
        {"fields": {"evaluated_on": "clean_set"}},
    ],
)
def test_what_makes_a_group(other: dict, run) -> None:
    text = summarise([run(0), run(1, **other)])
    assert len(rows(text)) == 4
    assert all(row["seeds"] == "1" for row in rows(text))
    assert "Mixed" not in text


def test_no_attack_has_no_x2x_and_no_trouble_with_null_groups(run) -> None:
    records = [run(0, attack={"name": "none"}, x2x=None), run(1, attack={"name": "none"}, x2x={"name": "all2one"})]
    assert {(row["attack"], row["x2x"], row["seeds"]) for row in rows(summarise(records))} == {("none", "-", "2")}


def test_mixed_settings_and_repeated_seeds_are_pointed_out(run) -> None:
    text = summarise([run(0), run(1, defense={"name": "mmac", "steps": 99, "fold_seed": 1})])
    assert "differ in defense.steps\n" in text
    assert "differ in defense.steps, " not in text
    assert "2 runs, but only 1 different seed\n" in summarise([run(0), run(0)])


def test_clean_set_sizes_are_in_the_order_of_numbers(run) -> None:
    text = summarise([run(fields={"clean_set_size": size}) for size in (1000, 20, 100)])
    assert text.index("set of 20\n") < text.index("set of 100\n") < text.index("set of 1000\n")


def test_load_records_skips_and_names_what_it_cannot_read(
    run, save_run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = run(0), run(1)
    save_run(tmp_path / "deep" / "b", second)
    save_run(tmp_path / "a", first)
    for name, content in {"cut": b'{"config": {', "list": b"[1]", "binary": b"\xff\xfe\x00", "other": b'{"a": 1}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert load_records(tmp_path) == [first, second]
    assert all(any(f"{name}/run.json" in message for message in caplog.messages) for name in ("cut", "list", "binary", "other"))
    assert len(caplog.messages) == 4


def test_older_records_are_left_out_with_a_warning_each(
    run, save_run, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "new", run())
    for name in ("old", "older"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"status": "done", "config": {"seed": 0}, "metrics": {}}))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == summarise([run()])
    assert [message.partition(" is a record of schema 1")[0] for message in caplog.messages] == [
        f"skipped: '{tmp_path / name / 'run.json'}'" for name in ("old", "older")
    ]


def test_main_prints_writes_and_draws(run, save_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(fields={"history": [{"agreement": 1.0}, {"agreement": 0.9}]})
    folder = save_run(tmp_path / "runs" / "one", record)
    output = tmp_path / "new" / "summary.md"
    assert main([str(tmp_path / "runs"), "--output", str(output), "--figures"]) == 0
    printed = capsys.readouterr().out
    assert printed == output.read_text(encoding="utf-8") == summarise([record])
    assert [path.name for path in (folder / "figures").iterdir()] == ["learning.png"]


def test_main_goes_on_after_a_folder_that_cannot_be_drawn(
    run, save_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save_run(tmp_path / "a", run())
    whole = save_run(tmp_path / "b", run(1, fields={"history": [{"agreement": 1.0}]}))
    (broken / "arrays.safetensors").write_bytes(b"no tensors")
    assert main([str(tmp_path), "--figures"]) == 1
    assert "arrays.safetensors' cannot be read" in capsys.readouterr().err
    assert (whole / "figures" / "learning.png").exists()


@pytest.mark.parametrize("prog", ["python -m marginclip.reporting", "marginclip report"])
def test_the_help_names_the_command(prog: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"], prog=prog)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {prog} ")


def test_a_missing_folder_is_a_one_line_error(tmp_path: Path) -> None:
    source = str(Path(__file__).parents[2] / "src")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "marginclip.reporting", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: there is no folder '{tmp_path / 'runs'}'\n")


def test_a_folder_without_records_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: there is no run.json that can be read in '{tmp_path}' or below it\n"


def test_an_output_that_is_a_folder_is_an_error(run, save_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "a", run())
    assert main([str(tmp_path), "--output", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err


# -- imbalance, loss, lambda --------------------------------------------------------------------------------------------------


@pytest.fixture
def long_tailed(run):
    """Makes the record of an imbalanced run without attack, repaired with some lambda."""

    def make(seed: int = 0, *, initial: float = 0.1, acc: float = 0.8, **config) -> RunRecord:
        settings = {"attack": {"name": "none"}, "x2x": None, "imbalance": {"name": "exponential", "ratio": 100}}
        settings["defense"] = {"name": "mmom", "lambda_": {"initial": initial}}
        scores = {"acc": acc, "many": 0.9, "worst_class": 0.25, "ece": 0.1, "nll": 1.0 + seed, "macro_f1": 0.5}
        return run(seed, fields={"metrics": {"none": scores, "mmac": scores}}, **(settings | config))

    return make


def test_long_tailed_runs_have_their_own_columns_and_backdoor_runs_theirs(run, long_tailed) -> None:
    balanced = long_tailed(imbalance={"name": "none"})
    backdoor, clean = rows(summarise([run(), balanced]))[0], rows(summarise([run(), balanced]))[-1]
    assert list(backdoor)[5:] == ["ACC %", "ASR %", "PACC %", "TPR %", "FPR %", "AUC %", "seconds"]
    assert list(clean)[5:] == ["ACC %", "MANY %", "WORST %", "ECE %", "NLL", "seconds"]
    text = summarise([long_tailed(0), long_tailed(1)])
    assert [row["NLL"] for row in rows(text)] == ["1.500 ± 0.707"] * 2
    assert rows(text)[0]["ECE %"] == "10.0 ± 0.0"
    assert "Mixed" not in text


def test_imbalance_and_loss_make_sections(long_tailed) -> None:
    records = [
        long_tailed(),
        long_tailed(imbalance={"name": "exponential", "ratio": 20}),
        long_tailed(imbalance={"name": "step", "ratio": 100}),
        long_tailed(loss={"name": "mixup"}),
        long_tailed(1, loss={"name": "cross_entropy"}),
        long_tailed(imbalance={"name": "none"}),
    ]
    text = summarise(records)
    titles = [line.removeprefix("## digits, small_resnet (width 16), ") for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "clean set of 100",
        "exponential 20, clean set of 100",
        "exponential 100, clean set of 100",
        "exponential 100, mixup, clean set of 100",
        "step 100, clean set of 100",
    ]
    assert {row["seeds"] for row in rows(text)} == {"1", "2"}


def test_a_sweep_of_lambda_or_epochs_is_told_apart_in_the_order_of_size(long_tailed) -> None:
    text = summarise(long_tailed(initial=initial, acc=0.5 + initial) for initial in (1e-3, 0.0, 1e-5, 1e-4))
    names = [row["defense"] for row in rows(text)][::2]
    assert names == ["mmom (λ = 0)", "mmom (λ = 1e-05)", "mmom (λ = 0.0001)", "mmom (λ = 0.001)"]
    assert "Mixed" not in text
    text = summarise(long_tailed(training={"epochs": epochs}) for epochs in (1000, 200))
    assert [row["defense"] for row in rows(text)][::2] == ["mmom (200 epochs)", "mmom (1000 epochs)"]
    assert {row["defense"] for row in rows(summarise([long_tailed(0), long_tailed(1)]))} == {"mmom"}
