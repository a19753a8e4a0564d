"""SIGTERM and Ctrl-C end runs, sweeps and repairs in one sentence, with 143 or 130, and the same command goes on."""

import json
import signal

import pytest

pytestmark = pytest.mark.slow
TERM, INT = signal.SIGTERM, signal.SIGINT
WORDS = [
    "dataset=digits", "trainer=exact", "trainer.enable_progress_bar=false", "logger=none", "model.width=2", "model.blocks=[1]",
    "defense=none", "attack=none", "training.epochs=2", "runs_dir=runs", "figures=false",
]  # fmt: skip
# A command whose process signals itself before one step of training, or while the data is loaded.
CODE = """
import os, sys
from marginclip.training import PoisonedTraining
from marginclip.data import Digits

number, place = int(sys.argv.pop(1)), sys.argv.pop(1)
step, load, seen = PoisonedTraining.training_step, Digits.load, []

def signalling_step(self, batch, batch_idx):
    seen.append(batch_idx)
    if place == str(len(seen)):
        os.kill(os.getpid(), number)
    return step(self, batch, batch_idx)

def signalling_load(self):
    if place == "load":
        os.kill(os.getpid(), number)
    return load(self)

PoisonedTraining.training_step, Digits.load = signalling_step, signalling_load
from marginclip.cli import main
main()
"""


@pytest.fixture
def run(program, tmp_path):
    """Runs ``marginclip defend WORDS``, which signals itself with ``number`` at ``place``."""
    return lambda number, place, *words: program(["-c", CODE, str(int(number)), place, "defend", *words, *WORDS], cwd=tmp_path)


def check(done, number):
    """It ended in one sentence, with the status of the signal."""
    assert done.returncode == 128 + number, done.stderr
    word = {TERM: "terminated", INT: "interrupted"}[number]
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told == [f"error: {word}; the same command goes on from the last checkpoint"]
    assert "Traceback" not in done.stderr


def test_a_signal_before_training_ends_a_run(run):
    check(run(INT, "load"), INT)


def test_a_signal_during_training_ends_a_sweep_which_goes_on(run, tmp_path):
    """Eight steps an epoch, sixteen a run: step 28 is in the second epoch of the second run."""
    sweep = ("-m", "seed=0,1")
    check(run(TERM, "28", *sweep), TERM)
    assert len(list(tmp_path.glob("runs/victims/*/checkpoint/last.ckpt"))) == 1
    (first,) = tmp_path.glob("runs/*/run.json")
    written = first.stat().st_mtime_ns
    assert run(TERM, "9", *sweep).returncode == 0, "one epoch was left, eight steps"
    assert first.stat().st_mtime_ns == written
    assert [json.loads(path.read_text())["status"] for path in tmp_path.glob("runs/*/run.json")] == ["done", "done"]


REPAIR = """
import os, signal
import torch
import marginclip

class Signalled(marginclip.MMAC):
    def training_step(self, batch, batch_idx):
        if self.global_step == {step}:
            os.kill(os.getpid(), signal.{name})
        return super().training_step(batch, batch_idx)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).eval()
images = torch.rand(30, 1, 4, 4)
try:
    marginclip.repair(model, images, model(images).argmax(1), defense=Signalled(steps=6, check_every=2))
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    raise
print("repaired")
"""


@pytest.mark.parametrize(("name", "step", "statuses"), [("SIGTERM", 5, (143, -15)), ("SIGINT", 3, (130, -2))])
def test_a_signal_during_a_repair_is_no_success(program, tmp_path, name, step, statuses):
    """In the last of six steps, too; Ctrl-C reaches the caller as the exception that Python makes of it."""
    code = REPAIR.format(name=name, step=step)
    done = program(["-c", code], cwd=tmp_path)
    assert "repaired" not in done.stdout
    assert done.returncode in statuses, done.stderr
