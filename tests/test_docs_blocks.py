"""Every code block of the documents is run, or its options are checked; a block that cannot be says why in front of it:

<!-- not run: it needs a GPU -->
"""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from marginclip.cli import WITH_HYDRA, _as_options
from marginclip.experiment import artefact_commands, dashboard, status
from marginclip.experiment.override_checks import check_overrides
from marginclip.reporting import __main__ as reporting

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w*)(?P<title>[^\n]*)\n(?P<content>.*?)^```$",
    flags=re.S | re.M,
)
OWN_TESTS = ("adding-",)  # tests/test_adding.py writes these pages' files and runs their commands
RUN_ELSEWHERE = (
    "README.md",
    "your-model.md",
    "audit.md",
    "walk-through.md",
)  # by tests/test_docs.py, tests/test_walk_through.py
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def blocks(path, language):
    found = [block for block in BLOCK.finditer(path.read_text()) if block["language"] == language and block["why"] is None]
    return [block["content"] for block in found if "title=" not in block["title"]]


def commands(path):
    """The commands of the ``bash`` blocks that are not marked, as words; each part of ``a && b`` is one."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [*shlex.split(line, comments=True), "&&"]
            while words:
                end = words.index("&&")
                if words[:end]:
                    yield words[:end]
                words = words[end + 1 :]


def own_commands():
    for path in DOCUMENTS:
        if not path.name.startswith(OWN_TESTS):
            for words in commands(path):
                if words[0] == "marginclip":
                    yield pytest.param(words[1], words[2:], id=f"{path.name}: {' '.join(words[1:])}")


@pytest.mark.parametrize(("command", "arguments"), list(own_commands()))
def test_commands_of_marginclip_take_these_arguments(command, arguments, tmp_path, monkeypatch, capsys):
    """What reads no configuration is run in an empty folder, where it gets as far as missing its input."""
    arguments = arguments[: arguments.index(">")] if ">" in arguments else arguments
    if command in WITH_HYDRA:
        given = _as_options(arguments) if command in ("audit", "repair") else arguments
        check_overrides([word for word in given if not word.startswith("-")], command, ROOT / "conf")
        assert {word for word in given if word.startswith("-")} <= {"-m", "--help"}
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if command == "dashboard":  # with a file it needs no key, and writes its specification
        arguments = [word for word in arguments if word != "--output" and not word.endswith(".json")]
    programs = {"report": reporting.main, "status": status.main, "dashboard": dashboard.main}
    code = programs[command](arguments) if command in programs else artefact_commands.main(command, arguments)
    assert code == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_other_commands_name_what_there_is(path):
    for words in commands(path):
        if words[:2] == ["pip", "install"]:
            for word in words:
                extra = re.fullmatch(r"(?:\.|marginclip)\[(.*)\]", word)
                assert extra is None or set(extra[1].split(",")) <= set(EXTRAS), word
        if words[0] == "make":
            assert set(words[1:]) <= TARGETS
        if words[0] == "python" and words[1].startswith("benchmarks/"):
            script = (ROOT / words[1]).read_text()
            flags = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
            assert all(f'"{flag}"' in script for flag in flags), words
        if words[0] in ("pytest", "sh"):
            assert all((ROOT / word).exists() for word in words[1:] if "/" in word), words


def stand_ins(size, classes):
    """What a reader of a page has: a network, clean images with their labels, new images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 8), nn.ReLU(), nn.Linear(8, classes)).eval()
    images = torch.rand(40 * classes, 3, size, size)
    with torch.no_grad():
        network[-1].bias -= network(images).mean(0)  # else it would decide for one class
    labels = network(images).argmax(1)
    return {
        "network": network,
        "model": network,
        "images": images,
        "labels": labels,
        "new_images": torch.rand(9, 3, size, size),
    }


# A search of 300 steps takes seconds even on a stand-in.
SHORTER = {"num_classes=10)": "num_classes=10, steps=3, simulations=100)"}


def with_python():
    return [path for path in DOCUMENTS if blocks(path, "python") and path.name not in RUN_ELSEWHERE]


@pytest.mark.parametrize("path", with_python(), ids=lambda path: path.name)
def test_python_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    has = stand_ins(32, 10) if "(3, 32, 32)" in text else stand_ins(4, 3)
    for block in blocks(path, "python"):
        for written, shorter in SHORTER.items():
            block = block.replace(written, shorter)
        exec("import torch, marginclip\n" + block, has)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_is_of_a_known_language(path):
    """Plain blocks show what is printed; what looks like a command in one would escape the tests."""
    for block in BLOCK.finditer(path.read_text()):
        assert block["language"] in ("", "bash", "python", "yaml", "json", "text"), block[0]
        if block["language"] in ("", "text"):
            assert not re.search(r"^(python |marginclip |pip )", block["content"], flags=re.M), block[0]
        if block["language"] == "yaml" and block["why"] is None:
            yaml.safe_load(block["content"])


def test_the_reading_of_blocks_is_right(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: why -->\n```bash\nrm x\n```\n\n```bash\nmake a \\\n  b && make c  # d\n```\n```\nbash\n```\n"
    )
    assert list(commands(page)) == [["make", "a", "b"], ["make", "c"]]
    assert next(BLOCK.finditer(page.read_text()))["why"] == "why"
