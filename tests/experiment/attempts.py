"""A tiny run, killed at many points and then finished, as a program: ``python attempts.py FOLDER``.

It imports everything once and forks a child for each attempt, which is far cheaper than a new Python. It leaves in FOLDER the run that
was never killed, ``through``, the runs that were, ``killed-*``, one that two processes did at once, ``together``, and the exit statuses.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from marginclip.experiment.command import plain
from marginclip.experiment.run import defend
from marginclip.experiment.spec import run_spec
from marginclip.files import write_json

CONF = str(Path(__file__).parents[2] / "conf")
WRITING = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}  # audit events: each comes before what it names is done
STEPS, HALVES, TIMES = 10, 6, 6  # kills before a step of writing, with half a file written, at any time


def make_images(root):
    """Two classes of twelve images of noise, 8 x 8 pixels, the second class brighter."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 128, (8, 8, 3)) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:02}.png")


def configuration(root):
    """All stages: the cache of images, a victim of two epochs, a repair of two rounds, a detector, a record."""
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("defend", overrides=[
            "dataset=image_folder", f"dataset.root={root}", "logger=none", "trainer=exact", "trainer.enable_progress_bar=false",
            "model.width=2", "model.blocks=[1]", "training.epochs=2", "training.batch_size=4", "attack.min_success=0",
            "attack.patch_size=2", "x2x.target=0", "clean_per_class=2", "reserve_per_class=2", "defense.steps=4", "defense.extra_steps=4",
            "defense.check_every=2", "defense.ascent.first_steps=1", "defense.ascent.steps=1", "defense.ascent.starts_per_class=1",
            "defense/detector=paper", "figures=false",
        ])  # fmt: skip
    return plain(config)


def is_step(event, arguments, below):
    """Whether an audit event is a step of writing below a folder: opening to write, moving, removing, making a folder."""
    if event not in WRITING or not str(arguments[0]).startswith(below):
        return False
    return event != "open" or bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))


def killed():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def attempt(content, runs_dir, *, step=None, half=None):
    """Do the run in ``runs_dir``: killed before the ``step``-th step of its writing, or with half of the ``half``-th file written."""
    steps, moved, replace = [], [], Path.replace

    def watch(event, arguments):
        if is_step(event, arguments, str(runs_dir)):
            steps.append(event)
            if len(steps) - 1 == step:
                killed()

    def cut(partial, path):
        moved.append(str(path))
        if len(moved) - 1 == half:
            os.truncate(partial, partial.stat().st_size // 2)
            killed()
        return replace(partial, path)

    Path.replace = cut
    sys.addaudithook(watch)
    here = {"runs_dir": str(runs_dir), "dataset": content["dataset"] | {"cache": str(runs_dir / "cache")}}
    defend(run_spec(content | here))
    return len(steps), len(moved)


def in_child(work):
    """Call ``work`` in a fork of this process; returns the child's id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return child


def kill_and_finish(content, runs_dir, kind, value):
    """One attempt that is killed and one that is not; returns their exit statuses (negative: the signal)."""
    settings = {} if kind == "seconds" else {kind: value}
    child = in_child(lambda: attempt(content, runs_dir, **settings))
    if kind == "seconds":
        time.sleep(value)
        os.kill(child, signal.SIGKILL)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]
    child = in_child(lambda: attempt(content, runs_dir))
    return [*statuses, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


def main(folder):
    make_images(folder / "images")
    content, started = configuration(folder / "images"), time.monotonic()
    through = in_child(lambda: write_json(folder / "count.json", attempt(content, folder / "through")))
    assert os.waitpid(through, 0)[1] == 0
    seconds, (steps, files) = time.monotonic() - started, json.loads((folder / "count.json").read_text())
    draw = random.Random(0)
    points = [("step", step) for step in draw.sample(range(steps), STEPS)]
    points += [("half", half) for half in draw.sample(range(files), HALVES)]
    points += [("seconds", draw.uniform(0, seconds)) for _ in range(TIMES)]

    def work(share):
        for number in range(share, len(points), 2):
            statuses = kill_and_finish(content, folder / f"killed-{number}", *points[number])
            write_json(folder / f"result-{number}.json", {"point": points[number], "statuses": statuses})

    both = [in_child(lambda: attempt(content, folder / "together")) for _ in range(2)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in both]
    write_json(folder / "together.json", statuses)
    for child in [in_child(lambda share=share: work(share)) for share in (0, 1)]:
        os.waitpid(child, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
