"""docs/walk-through.md, block by block, in an empty folder; audit and repair take fewer steps than a reader's."""

import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from marginclip.cli import _as_options
from marginclip.defenses import MMOM
from marginclip.experiment import artefact_commands, handed_over
from marginclip.experiment.command import plain
from marginclip.experiment.spec import run_spec
from marginclip.service import audit

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "docs" / "walk-through.md").read_text(), flags=re.S)
FEWER = {
    "audit": (handed_over.audit_model, ["defense.steps=4", "defense.extra_steps=0", "detect.starts=1", "detect.steps=2"]),
    "repair": (handed_over.repair_model, ["defense.steps=10", "defense.extra_steps=0"]),
}
OWN = ("output", "images_suspect", "json", "tolerance", "memory_gib")


def run(words):
    """A command of the page, in this process."""
    name, command, *rest = words
    assert name == "marginclip"
    if command not in FEWER:
        assert artefact_commands.main(command, rest) == 0
        return
    function, fewer = FEWER[command]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        content = plain(compose(command, [*_as_options(rest), *fewer, "trainer.threads=1"]))
    own = {key: content.pop(key) for key in OWN if key in content}
    function(run_spec(content), **own)


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "nets", None)  # another test's file of this name may be there; it is again afterwards
    del sys.modules["nets"]
    monkeypatch.setattr(handed_over, "audit", partial(audit, mmom=MMOM(steps=4, check_every=2)))
    space = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(block, space)
            continue
        for words in (shlex.split(line) for line in block.strip().splitlines()):
            run(words)
    assert {kind for kind, _ in BLOCKS} == {"python", "bash"}
    assert len(space["rows"]) == 9 * 15
    assert (tmp_path / "audited" / "audit.html").exists()
    told = capsys.readouterr().err
    assert told.count("this takes about") == 2
    assert "135 images, " in told
