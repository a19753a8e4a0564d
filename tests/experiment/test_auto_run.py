"""defense=auto from the command line's configuration to its record."""

import json

from marginclip.experiment.run import defend

SHORT = [
    f"defense.{repair}.{setting}"
    for repair in ("mmac", "mmom")
    for setting in ("steps=2", "check_every=1", "ascent.first_steps=1", "ascent.steps=1", "ascent.starts_per_class=1")
]
SHORT += ["defense.detection.starts=2", "defense.detection.steps=5", "defense.detection.simulations=100"]
# At so high a level MM-BD suspects any model, and neither a gain nor a cost is large enough to matter.
FORCED = ["defense.detection.alpha=0.999", "defense.min_gain=0.99", "defense.max_cost=1"]


def test_the_decision_is_in_the_record_and_in_the_log(configure_at, tmp_path, caplog):
    with caplog.at_level("INFO", logger="marginclip"):
        record = defend(configure_at(tmp_path, "defense=auto", *FORCED, *SHORT))
    content = json.loads(record.path.read_text())
    assert content["status"] == "done"
    assert set(content["metrics"]) == {"none", "auto"}
    assert content["rows"]["auto"]["label"] == "automatic choice"
    found = content["findings"]
    assert found["decision"] == "mmac"
    assert len(content["history"]) == 3
    assert (record.folder / "bounds.safetensors").exists()
    assert f"defense=auto keeps mmac: {found['reason']}" in caplog.messages
