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

from marginclip.reporting import load_records, summarise
from marginclip.reporting.__main__ import main


def run(seed: int = 0, *, acc: float = 0.9, asr: float | None = 0.1, status: str = "done", **changes: object) -> dict:
    config = {
        "dataset": {"name": "digits"},
        "model": {"name": "small_resnet", "width": 16, "activation": "relu"},
        "attack": {"name": "badnet", "rate": 0.1},
        "x2x": {"name": "all2one"},
        "defense": {"name": "mmac", "steps": 60, "fold_seed": seed},
        "seed": seed,
        "runs_dir": f"runs{seed}",
    }
    mmac = {"acc": acc} if asr is None else {"acc": acc, "asr": asr}
    metrics = {"none": {"acc": 0.95, "asr": 1.0}, "mmac": mmac}
    seconds = {"repair": 10.0 + seed}
    return {"config": config | changes, "metrics": metrics, "seconds": seconds, "status": status, "clean_set_size": 100}


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


def save(folder: Path, record: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_means_and_sample_deviations_over_seeds() -> None:
    accuracies, rates = [0.91, 0.93, 0.98], [0.0, 0.1, 0.5]
    text = summarise(run(seed, acc=acc, asr=asr) for seed, (acc, asr) in enumerate(zip(accuracies, rates, strict=True)))
    none, mmac = rows(text)
    assert (none["row"], mmac["row"], mmac["seeds"]) == ("no defense", "MMAC", "3")
    assert mmac["ACC %"] == f"{100 * sum(accuracies) / 3:.1f} ± {100 * statistics.stdev(accuracies):.1f}"
    assert mmac["ASR %"] == f"{100 * sum(rates) / 3:.1f} ± {100 * statistics.stdev(rates):.1f}"
    assert (mmac["TPR %"], mmac["seconds"], none["seconds"]) == ("-", "11.0 ± 1.0", "-")
    assert "Mixed" not in text
    assert "Left out" not in text


def test_one_seed_has_no_deviation() -> None:
    assert [row["ACC %"] for row in rows(summarise([run()]))] == ["95.0", "90.0"]


def test_missing_values_are_counted() -> None:
    mmac = rows(summarise([run(0, asr=0.2), run(1, asr=0.4), run(2, asr=None)]))[1]
    assert mmac["ASR %"] == "30.0 ± 14.1 (n=2)"


@pytest.mark.parametrize(("status", "reason"), [("attack_failed", "attack failed"), ("failed", "run failed")])
def test_failed_runs_are_named_and_in_no_mean(status: str, reason: str) -> None:
    bad = run(1, acc=0.0, asr=1.0, status=status) | {"path": "runs/the-bad-one"}
    if status == "failed":
        del bad["metrics"]
    text = summarise([run(0), bad])
    assert rows(text) == rows(summarise([run(0)]))
    assert "Left out of the means (1)" in text
    assert "the-bad-one" in text
    assert f"seed 1: {reason}" in text


def test_a_group_of_failed_runs_alone_has_no_table() -> None:
    text = summarise([run(status="attack_failed")])
    assert rows(text) == []
    assert "(ASR without defense 100.0 %)" in text


@pytest.mark.parametrize(
    "other",
    [
        run(1, dataset={"name": "cifar10"}),
        run(1, model={"name": "small_resnet", "width": 32, "activation": "relu"}),
        run(1, model={"name": "small_resnet", "width": 16, "activation": "leaky_relu"}),
        run(1, attack={"name": "blend", "rate": 0.1}),
        run(1, x2x={"name": "all2all"}),
        run(1, defense={"name": "mmbm", "steps": 60}),
        run(1) | {"clean_set_size": 1000},
        run(1) | {"evaluated_on": "clean_set"},
    ],
)
def test_what_makes_a_group(other: dict) -> None:
    text = summarise([run(0), other])
    assert len(rows(text)) == 4
    assert all(row["seeds"] == "1" for row in rows(text))
    assert "Mixed" not in text


def test_no_attack_has_no_x2x_and_no_trouble_with_null_groups() -> None:
    records = [run(0, attack={"name": "none"}, x2x=None), run(1, attack={"name": "none"}, x2x={"name": "all2one"})]
    assert {(row["attack"], row["x2x"], row["seeds"]) for row in rows(summarise(records))} == {("none", "-", "2")}


def test_mixed_settings_and_repeated_seeds_are_pointed_out() -> None:
    text = summarise([run(0), run(1, defense={"name": "mmac", "steps": 99, "fold_seed": 1})])
    assert "differ in defense.steps\n" in text
    assert "differ in defense.steps, " not in text
    assert "2 runs, but only 1 different seed\n" in summarise([run(0), run(0)])


def test_clean_set_sizes_are_in_the_order_of_numbers() -> None:
    text = summarise([run() | {"clean_set_size": size} for size in (1000, 20, 100)])
    assert text.index("set of 20\n") < text.index("set of 100\n") < text.index("set of 1000\n")


def test_load_records_skips_and_names_what_it_cannot_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = save(tmp_path / "deep" / "b", run(1))
    save(tmp_path / "a", run(0))
    for name, content in {"cut": b'{"config": {', "list": b"[1]", "binary": b"\xff\xfe\x00", "other": b'{"a": 1}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        records = load_records(tmp_path)
    assert [record["config"]["seed"] for record in records] == [0, 1]
    assert records[1]["path"] == str(good)
    assert all(any(f"{name}/run.json" in message for message in caplog.messages) for name in ("cut", "list", "binary", "other"))
    assert len(caplog.messages) == 4


def test_main_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "runs" / "one", run() | {"history": [{"agreement": 1.0}, {"agreement": 0.9}]})
    output = tmp_path / "new" / "summary.md"
    assert main([str(tmp_path / "runs"), "--output", str(output), "--figures"]) == 0
    printed = capsys.readouterr().out
    assert printed == output.read_text(encoding="utf-8") == summarise(load_records(tmp_path / "runs"))
    assert [path.name for path in (folder / "figures").iterdir()] == ["learning.png"]


def test_main_goes_on_after_a_folder_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, whole = save(tmp_path / "a", run()), save(tmp_path / "b", run(1) | {"history": [{"agreement": 1.0}]})
    (broken / "arrays.safetensors").write_bytes(b"no tensors")
    assert main([str(tmp_path), "--figures"]) == 1
    assert "arrays.safetensors' cannot be read" in capsys.readouterr().err
    assert (whole / "figures" / "learning.png").exists()


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
    assert printed.err == f"error: there is no run.json of a run in '{tmp_path}' or below it\n"


def test_an_output_that_is_a_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a", run())
    assert main([str(tmp_path), "--output", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err


# -- imbalance, loss, lambda --------------------------------------------------------------------------------------------------


def long_tailed(seed: int = 0, *, penalty: float = 0.1, acc: float = 0.8, **changes: object) -> dict:
    defense = {"name": "mmom", "repaired_row": "mmom", "penalty": {"initial": penalty}}
    settings = {"attack": {"name": "none"}, "x2x": None, "imbalance": {"name": "exponential", "ratio": 100}, "defense": defense}
    record = run(seed, **(settings | changes))
    scores = {"acc": acc, "many": 0.9, "worst_class": 0.25, "ece": 0.1, "nll": 1.0 + seed, "macro_f1": 0.5}
    return record | {"metrics": {"none": scores, "mmom": scores}}


def test_long_tailed_runs_have_their_own_columns_and_backdoor_runs_theirs() -> None:
    balanced = long_tailed(imbalance={"name": "none"})
    backdoor, clean = rows(summarise([run(), balanced]))[0], rows(summarise([run(), balanced]))[-1]
    assert list(backdoor)[5:] == ["ACC %", "ASR %", "PACC %", "TPR %", "FPR %", "AUC %", "seconds"]
    assert list(clean)[5:] == ["ACC %", "MANY %", "WORST %", "ECE %", "NLL", "seconds"]
    text = summarise([long_tailed(0), long_tailed(1)])
    assert [row["NLL"] for row in rows(text)] == ["1.500 ± 0.707"] * 2
    assert rows(text)[0]["ECE %"] == "10.0 ± 0.0"
    assert "Mixed" not in text


def test_imbalance_and_loss_make_sections() -> None:
    records = [
        long_tailed(),
        long_tailed(imbalance={"name": "exponential", "ratio": 20}),
        long_tailed(imbalance={"name": "step", "ratio": 100}),
        long_tailed(loss={"name": "mixup"}),
        long_tailed(1, loss={"name": "cross_entropy"}),  # the same as without the group
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


def test_a_sweep_of_lambda_or_epochs_is_told_apart_in_the_order_of_size() -> None:
    penalties = [1e-3, 0.0, 1e-5, 1e-4]
    text = summarise(long_tailed(penalty=penalty, acc=0.5 + penalty) for penalty in penalties)
    names = [row["defense"] for row in rows(text)][::2]
    assert names == ["mmom (λ = 0)", "mmom (λ = 1e-05)", "mmom (λ = 0.0001)", "mmom (λ = 0.001)"]
    assert "Mixed" not in text
    text = summarise(long_tailed(training={"epochs": epochs}) for epochs in (1000, 200))
    assert [row["defense"] for row in rows(text)][::2] == ["mmom (200 epochs)", "mmom (1000 epochs)"]
    assert {row["defense"] for row in rows(summarise([long_tailed(0), long_tailed(1)]))} == {"mmom"}
