"""What a command shows: lines away from a terminal, bars on one, nothing in a library."""

import io
import logging
import sys
import time

import pytest
from rich.console import Console
from rich.table import Table

from marginclip.durations import duration
from marginclip.experiment import progress
from marginclip.experiment.progress import Display, Lines, Task, task, tracked
from marginclip.experiment.progress_bars import Bars


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def silent():
    yield
    progress.use(Display())


def test_a_line_a_minute(clock, capsys):
    progress.use(Lines(lambda: "2 of 9 cells done"))
    with task("training a", 300, "batches", done=100) as outer:
        for second in range(1, 151):
            clock[0] += 1
            outer.advance(100 + second, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "2 of 9 cells done | training a: 160 of 300 batches, about 2 min left, loss 0.5",
        "2 of 9 cells done | training a: 220 of 300 batches, about 80 s left, loss 0.5",
    ]


def test_short_tasks_after_each_other_have_lines_too(clock, capsys):
    progress.use(Lines())
    for number in range(9):
        with task(f"fold {number}", 2) as made:
            for step in (1, 2):
                clock[0] += 10
                made.advance(step)
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_task_that_does_not_advance_has_lines_too(capsys):
    progress.use(Lines(interval=0.02))
    with task("evaluation"):
        for _ in range(500):
            time.sleep(0.01)
            if "evaluation" in (said := capsys.readouterr().err):
                break
    assert said.startswith("evaluation\n")
    time.sleep(0.05)
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == "", "the lines end with the task"


def test_a_task_that_counts_nothing_gives_way_to_one_inside_it():
    shown = Display(lambda: "1 of 2 cells done")
    progress.use(shown)
    with task("repair"):
        assert (str(shown), shown.doing) == ("1 of 2 cells done | repair", "repair")
        with task("MMAC", 9):
            assert shown.doing == "MMAC: 0 of 9 steps"
    assert str(shown) == "1 of 2 cells done"


def test_nothing_where_nobody_asked(capsys):
    with task("training", 3) as made:
        made.advance(3)
    assert list(tracked("folds")(range(4))) == [0, 1, 2, 3]
    assert "".join(capsys.readouterr()) == ""


def test_what_is_tracked_is_shown_as_it_goes_and_ends_when_it_is_left():
    shown = Display()
    progress.use(shown)
    for step in tracked("MM-BD")(range(10)):
        assert str(shown).startswith(f"MM-BD: {step} of 10 steps")
        if step == 3:
            break
    assert shown.tasks == []


def test_an_unknown_total_has_no_time_left(clock):
    made = Task("waiting", None)
    clock[0] += 5
    assert made.seconds_left is None
    assert str(made) == "waiting"
    made.advance(2)
    assert str(made) == "waiting: 2 steps"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5340, "89 min"), (5400, "1 h 30 min"), (12000, "3 h 20 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_bars_with_the_table_of_a_sweep_above(clock):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)

    def table():
        made = Table("cells", "done", box=None)
        made.add_row("20", "7")
        return made

    bars = Bars(table, console)
    progress.use(bars)
    with task("training a", 8, "batches") as outer, task("inner"):
        clock[0] += 4
        outer.advance(4, "loss 0.5")
        before = len(file.getvalue())
        console.print(bars.drawn())
        text = file.getvalue()[before:]
        assert [text.index(word) for word in ("cells", "20", "training a", "inner")] == sorted(
            text.index(word) for word in ("cells", "20", "training a", "inner")
        )
        assert "4/8 batches" in text
        assert "4 s left" in text
        assert "loss 0.5" in text
    assert bars.live is None


def test_log_lines_go_above_the_bars_and_back(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        progress.use(Bars(console=Console(file=io.StringIO(), force_terminal=True)))
        with task("training"):
            assert handler.stream is sys.stdout is not terminal
        assert handler.stream is sys.stdout is terminal
    finally:
        logging.getLogger().removeHandler(handler)


def test_a_training_detector_folds_and_mmbd_are_shown(configure, monkeypatch):
    """Each of them by its own name, in one run."""
    from marginclip.experiment.run import defend

    seen = []

    class Seen(Display):
        def changed(self):
            seen.append(str(self))

    progress.use(Seen())
    options = ["detect=mmbd", "detect.steps=3", "detect.starts=2", "training.epochs=1", "defense.start.share=0.01"]
    defend(configure("trainer.enable_progress_bar=true", *options))  # a start so tight that extra steps are taken
    text = "\n".join(seen)
    assert "training digits-small_resnet-badnet-all2one-seed0" in text
    assert "8 of 8 batches" in text
    assert "train/loss" not in text
    assert "mmbd: 3 of 4 steps" in text
    assert "MMAC: 4 of 4 batches" in text, "extra steps count when they begin"
    assert "MMAC: 5 of 8 batches" in text
    assert "detector: 1 of 2 folds" in text
    assert "detector: 0 of 2 folds | repair without a fold: 0 of" in text
    assert "evaluation" in seen
