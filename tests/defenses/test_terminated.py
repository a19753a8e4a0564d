"""A repair that is terminated does not end as if it had succeeded."""

import os
import signal
import subprocess
import sys
import time

CODE = """
import os, signal
import torch
import marginclip

class Slow(marginclip.MMAC):
    def training_step(self, batch, batch_idx):
        if self.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).eval()
images = torch.rand(30, 1, 4, 4)
marginclip.repair(model, images, model(images).argmax(1), defense=Slow())
print("repaired")
"""


def test_sigterm_during_a_repair_is_no_success():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert "repaired" not in done.stdout
    assert done.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), done.stderr


def test_sigterm_during_a_run_is_no_success_and_the_run_goes_on(tmp_path):
    words = [
        "dataset=digits", "trainer=exact", "trainer.enable_progress_bar=false", "logger=none", "model.width=4", "defense=none",
        "training.epochs=400", "runs_dir=runs", "attack.min_success=0",
    ]  # fmt: skip
    run = subprocess.Popen(
        [sys.executable, "-m", "marginclip", "defend", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while not list(tmp_path.glob("runs/victims/*/checkpoint/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    run.terminate()
    _, told = run.communicate(timeout=200)
    assert run.returncode == 128 + signal.SIGTERM, told
    assert "error: terminated; the same command goes on from the last checkpoint" in told
    assert "Traceback" not in told
    assert list(tmp_path.glob("runs/victims/*/checkpoint/last.ckpt"))
