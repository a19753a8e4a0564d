"""The installed command: what answers at once, old names, options of one's own; and the wheel, outside the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from marginclip import __version__
from marginclip.experiment.old_names import with_new_names

ROOT = Path(__file__).parents[1]
SMALL = [
    "dataset=digits", "trainer=exact", "training.epochs=1", "model.width=4", "clean_per_class=4", "figures=false", "logger=none",
    "defense=static_clip", "defense.detector.folds=0", "attack.min_success=0", "runs_dir=out",
]  # fmt: skip


def call(*arguments, cwd, command=(sys.executable, "-m", "marginclip")):
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=cwd, timeout=240, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["defence"]])
def test_what_needs_nothing_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom marginclip.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as end:\n    print(end)\n"
        "print({'torch', 'hydra', 'lightning', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr


def test_version_help_and_a_command_that_does_not_exist(tmp_path):
    assert call("--version", cwd=tmp_path).stdout == f"marginclip {__version__}\n"
    assert "marginclip defend" in call(cwd=tmp_path).stdout
    done = call("defned", "attack=badnet", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == "error: unknown command 'defned'; did you mean 'defend'? "
        "(there are defend, train, audit, repair, scan, export, report, status, dashboard)\n"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("defense.penalty.initial=0.1", "defense.lambda_.initial=0.1"),
        ("+defense.mmac.penalty.factor=2", "+defense.mmac.lambda_.factor=2"),
        ("attack.defender.penalty.initial=1", "attack.defender.lambda_.initial=1"),
        ("defense/schedule=near,authors_code", "defense/schedule=clean_starts,authors_code"),
        ("defense/schedule@defense.mmom=balanced_paper", "defense/schedule@defense.mmom=mmom_paper"),
        ("defense/schedule=choice(near, warm)", "defense/schedule=choice(clean_starts, warm_noise)"),
        ("~defense/schedule=near", "~defense/schedule=clean_starts"),
    ],
)
def test_old_names_are_understood_with_a_warning(capsys, old, new):
    assert with_new_names([old, "seed=1"]) == [new, "seed=1"]
    assert capsys.readouterr().err.count("warning:") == 1


@pytest.mark.parametrize("argument", ["defense.penalty=0.01", "dataset.root=a/near", "attack=badnet", "-m", "defense=mmac"])
def test_other_words_are_left_alone(capsys, argument):
    assert with_new_names([argument]) == [argument]
    assert capsys.readouterr().err == ""


def option(folder, target):
    path = folder / "mine" / "defense" / "own.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"name: own\nrepaired_row: own\ndetector_row: null\ndetector: null\n_target_: {target}\n")


def test_a_class_that_does_not_exist_is_one_sentence(program, tmp_path):
    option(tmp_path, "nowhere.Own")
    small = [word for word in SMALL if not word.startswith("defense")]
    done = program(["-m", "marginclip", "defend", "--config-dir", "mine", "defense=own", *small], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: defense._target_='nowhere.Own' cannot be imported (")
    assert "Traceback" not in done.stderr


def test_options_of_ones_own_are_known_to_the_check(tmp_path):
    option(tmp_path, "nowhere.Own")
    done = call("defend", "--config-dir", "mine", "defense=onw", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "unknown option defense=onw; did you mean 'own'?" in done.stderr


def test_ones_own_option_stands_in_the_place_of_ours(tmp_path):
    path = tmp_path / "mine" / "attack" / "badnet.yaml"
    path.parent.mkdir(parents=True)
    path.write_text((ROOT / "conf" / "attack" / "badnet.yaml").read_text().replace("rate: 0.1", "rate: 0.77"))
    done = call("defend", "--config-dir=mine", "--cfg=job", cwd=tmp_path)
    assert "rate: 0.77" in done.stdout, done.stderr
    assert "rate: 0.1\n" in call("defend", "--cfg=job", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("marginclip ", "defend train audit repair scan export report status dashboard"),
        ("marginclip de", "defend"),
        ("marginclip defend attack=b", "attack=badnet attack=blend attack=blend_full"),
        ("marginclip train attack=wa", "attack=wanet"),
        ("marginclip report ru", ""),
    ],
)
def test_the_shell_is_answered(tmp_path, line, answers):
    environment = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    asked = [sys.executable, "-m", "marginclip", "-sc", "query=bash"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert (done.stdout.strip(), done.returncode) == (answers, 0), done.stderr


def test_the_completion_is_installed_for_the_command(tmp_path):
    assert call("defend", "-sc", "install=bash", cwd=tmp_path).stdout.rstrip().endswith("-F hydra_bash_completion marginclip")


@pytest.mark.parametrize(("folder", "message"), [("nowhere", "is not a folder"), (".", "holds no option")])
def test_a_config_dir_without_options_is_refused(tmp_path, folder, message):
    done = call("defend", "--config-dir", folder, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --config-dir='{folder}' {message}")
    assert done.stderr.count("\n") == 1


def test_the_wheel_runs_the_main_job_outside_the_checkout(tmp_path):
    """Built, installed into a fresh virtual environment that sees this one's dependencies, and run in an empty folder."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(build, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "installed"
    venv.create(place, with_pip=False)
    python, (packages,) = place / "bin" / "python", place.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text(
        sysconfig.get_path("purelib")
    )  # the dependencies, without what is installed here as editable
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    work.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words):
        return subprocess.run(words, capture_output=True, text=True, cwd=work, timeout=240, env=environment)

    where = run(str(python), "-c", "import marginclip; print(marginclip.__file__)").stdout
    assert where.startswith(str(place)), where
    command = [str(place / "bin" / "marginclip")]
    done = run(*command, "defend", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((work / done.stdout.splitlines()[-1]).read_text())
    assert record["status"] == "done"
    assert "static clip" in run(*command, "report", "out").stdout


def test_the_command_is_installed():
    assert (Path(sysconfig.get_path("scripts")) / "marginclip").exists()
