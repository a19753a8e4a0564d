"""The table of the paper at the end of a sweep, from the records that its jobs left."""

import json

from omegaconf import OmegaConf

from marginclip.experiment.sweeps import PublishedTable
from marginclip.record import RunRecord


def test_a_sweep_prints_its_table_from_its_own_finished_runs(tmp_path, capsys):
    for job, (seed, accuracy) in enumerate(((0, 0.88), (1, 0.90))):
        config = {"attack": {"name": "badnet"}, "x2x": {"name": "all2one"}, "dataset": {"name": "cifar10"}}
        rows = {"none": {"label": "no defense"}, "mmac": {"label": "MMAC"}}
        metrics = {"none": {"acc": 0.9}, "mmac": {"acc": accuracy}}
        record = RunRecord(config=config, seed=seed, status="done", rows=rows, metrics=metrics).at(
            tmp_path / "runs" / str(seed)
        )
        record.write()
        folder = tmp_path / "sweep" / str(job)
        folder.mkdir(parents=True)
        (folder / "outcome.json").write_text(json.dumps({"overrides": "", "error": None, "record": str(record.path)}))
    (tmp_path / "sweep" / "2").mkdir()
    (tmp_path / "sweep" / "2" / "outcome.json").write_text(json.dumps({"overrides": "", "error": "full disk", "record": None}))
    PublishedTable(table="table1").on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}}))
    shown = capsys.readouterr().out
    assert "| badnet all2one | MMAC | 2 | 89.0 ± 1.0 (88.4, +0.6) |" in shown
    assert (tmp_path / "sweep" / "table1.md").read_text() == shown
