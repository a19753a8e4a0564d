"""Loggers beside W&B: files of rows, TensorBoard, MLflow, several at once."""

import sys

import pytest
from PIL import Image

from marginclip.errors import UserError
from marginclip.experiment.command import with_group
from marginclip.experiment.loggers import opened_loggers
from marginclip.experiment.loggers.base import Destination, summary_metrics


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "learning.png"
    Image.new("RGB", (4, 3), (255, 0, 0)).save(path)
    return path


def publish(spec, folder, record, figures=()):
    with opened_loggers(spec, folder, job="defend", name="run") as loggers:
        loggers.publish(record, list(figures))


def test_without_loggers_a_trainer_gets_none(configure, tmp_path):
    with opened_loggers(configure("logger=none"), tmp_path, job="defend", name="run") as loggers:
        assert loggers.lightning is False


def test_rows_of_an_interrupted_run_are_kept(configure, tmp_path, finished):
    for _ in range(2):
        publish(configure("logger=csv"), tmp_path, finished[1])
    names, values = (line.split(",") for line in (tmp_path / "csv" / "metrics.csv").read_text().splitlines())
    assert float(values[names.index("none/acc")]) == pytest.approx(finished[1].metrics["none"]["acc"])
    assert (tmp_path / "csv" / "metrics-1.csv").exists()


def test_several_at_once(configure, tmp_path, finished, figure):
    """TensorBoard's table of runs has settings and results, and MLflow the same."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    mlflow = pytest.importorskip("mlflow")
    _, record = finished
    spec = configure("logger=[csv,tensorboard,mlflow]", "logger.mlflow.group=a/b")
    publish(spec, tmp_path / "run", record, [figure])
    assert (tmp_path / "run" / "csv" / "metrics.csv").exists()

    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Scalars("repaired/asr")[0].value == pytest.approx(record.metrics["mmac"]["asr"])
    assert events.Images("figures/learning")[0].width == 4
    started = shown_by_hparams(events, "session_start_info").session_start_info.hparams
    assert started["defense"].string_value == "mmdf"
    assert started["status"].string_value == record.status
    results = {each.name.tag for each in shown_by_hparams(events, "experiment").experiment.metric_infos}
    assert {"none/asr", "mmac/asr", "repaired/asr", "detector/tpr"} <= results <= {*events.Tags()["scalars"]}
    assert started["attack.rate"].number_value == pytest.approx(record.config["attack"]["rate"])

    client = mlflow.MlflowClient(f"file:{spec.runs_dir / 'mlruns'}")
    (run,) = client.search_runs([client.get_experiment_by_name("marginclip").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags.items() >= {"group": "a/b", "job_type": "defend", "attack": "badnet", "status": record.status}.items()
    assert run.data.metrics["mmac/asr"] == pytest.approx(record.metrics["mmac"]["asr"])
    assert [each.path for each in client.list_artifacts(run.info.run_id, "figures")] == ["figures/learning.png"]


def shown_by_hparams(events, part):
    """A part of what TensorBoard's HPARAMS page reads: the settings of a run, or which results it shows beside them."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    return plugin_data_pb2.HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/{part}").plugin_data.content)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_one_that_is_not_installed_says_how_to_install_it(configure, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "lightning.pytorch.loggers", None)
    with (
        pytest.raises(UserError, match=f"pip install 'marginclip\\[{name}\\]'"),
        opened_loggers(configure(f"logger={name}"), tmp_path, job="train", name="run"),
    ):
        pass


class Failing(Destination):
    """Begins, and is gone when the run is through."""

    def start(self, run):
        self.lightning = False

    def publish(self, record, figures):
        raise ConnectionError("no route to host")

    def close(self, status):
        raise ConnectionError("still none")


def test_one_that_fails_at_the_end_is_told_and_costs_nothing(configure, tmp_path, finished, caplog):
    spec = configure("logger=csv", "+logger.gone._target_=test_loggers.Failing")
    with pytest.MonkeyPatch.context() as changed:
        changed.setitem(sys.modules, "test_loggers", sys.modules[__name__])
        publish(spec, tmp_path, finished[1])
    assert (tmp_path / "csv" / "metrics.csv").exists()
    told = [record.message for record in caplog.records if "ConnectionError" in record.message]
    assert [each.partition(" could not ")[2] for each in told] == [
        "take the results of a run that is done (ConnectionError: no route to host)", "be closed (ConnectionError: still none)",
    ]  # fmt: skip


def test_a_word_in_the_place_of_a_logger_is_refused(configure, tmp_path):
    spec = configure("logger=none", "+logger.csv=yes")
    with (
        pytest.raises(UserError, match=r"^logger\.csv must be a group"),
        opened_loggers(spec, tmp_path, job="train", name="run"),
    ):
        pass


def test_metrics_are_named_by_row_and_by_what_a_row_is(finished):
    _, record = finished
    found = summary_metrics(record)
    assert found["none/acc"] == record.metrics["none"]["acc"]
    for name, row in (("repaired", "mmac"), ("detector", "mmdf")):
        own = {key: value for key, value in record.metrics[row].items() if value is not None}
        assert {key.partition("/")[2]: value for key, value in found.items() if key.startswith(f"{name}/")} == own
    assert found["seconds/repair"] == record.seconds["repair"]


def test_runs_of_a_sweep_are_of_its_group_where_none_is_named():
    loggers = {"wandb": {"group": None, "mode": "auto"}, "csv": {}, "mlflow": {"group": "mine"}}
    assert with_group(loggers, "a/b") == {"wandb": {"group": "a/b", "mode": "auto"}, "csv": {}, "mlflow": {"group": "mine"}}
