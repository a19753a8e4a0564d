"""The training set's class counts: told to a defense only where it asks for them, and the record says that it was an oracle."""

import json
import math

import pytest
import torch

from marginclip.errors import UserError
from marginclip.experiment.run import defend
from marginclip.experiment.setup import build_setup

IMBALANCED = ["imbalance=exponential", "imbalance.ratio=8", "defense=logit_adjustment", "training.epochs=1"]


def test_known_counts_are_those_of_the_imbalanced_training_set(configure):
    spec = configure(*IMBALANCED, "defense.class_counts=known")
    labels = build_setup(spec).splits.train.labels.tolist()
    counts = [labels.count(label) for label in range(10)]
    assert counts[0] >= 7 * counts[9]
    record = json.loads(defend(spec).path.read_text())
    findings = record["findings"]
    assert findings["oracle"] is True
    assert findings["prior_from"] == "counts"
    assert [math.log(share) for share in findings["prior"]] == pytest.approx(
        [math.log(count / sum(counts)) for count in counts]
    )
    assert set(record["metrics"]) == {"none", "logit_adjustment"}


def test_nobody_is_told_who_did_not_ask(configure):
    for setting, wanted in (("known", [1, 2]), ("estimated", list("estimated")), ("[5,6]", [5, 6])):
        made = configure(*IMBALANCED, f"defense.class_counts={setting}").defense.choice.make()
        made.tell(class_counts=[1, 2], suspect_class=3)
        assert list(made.class_counts) == wanted
        assert made.oracle_told is (True if setting == "known" else None)
    record = json.loads(defend(configure(*IMBALANCED)).path.read_text())
    assert "oracle" not in record["findings"]
    assert record["findings"]["prior_from"] == "estimated"


def test_someone_elses_model_has_no_known_training_set(configure, tmp_path):
    overrides = ["victim=checkpoint", f"victim.path={tmp_path / 'model.pt'}", "defense=logit_adjustment"]
    torch.save(build_setup(configure("victim=checkpoint")).model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"^defense\.class_counts=known needs the training set, which is not known here"):
        defend(configure(*overrides, "defense.class_counts=known"))
    with pytest.raises(UserError, match=r"one number for each of the 10 classes, got 3"):
        defend(configure(*overrides, "defense.class_counts=[5,4,3]"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("defense.tau=-1", "defense.tau must be a number from 0 up or auto, got -1"),
        ("defense.tau=best", "defense.tau must be a number from 0 up or auto, got 'best'"),
        ("defense.class_counts=given", "defense.class_counts must be estimated, known or one number a class, got 'given'"),
        ("defense.search.by=ece", "defense.search.by must be 'accuracy' or 'nll', got 'ece'"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_trained(job, setting, message):
    code, out, err = job("defense=logit_adjustment", setting)
    assert code == 1
    assert [line for line in (out + err).splitlines() if message in line]
    assert "Traceback" not in out + err
