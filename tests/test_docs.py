"""What the documents say exists: commands, links, figures; and every public name says what it is."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from marginclip.experiment.override_checks import check_overrides

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "marginclip").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [path for path in DOCUMENTS if path.exists()]


def commands(path):
    """The commands in a document's ```bash blocks, one for every part of an ``a && b`` line."""
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            if words:
                yield words


def script_lines():
    for path in DOCUMENTS:
        for words in commands(path):
            if words[:1] == ["python"] and words[1] in ("defend.py", "train.py"):
                yield pytest.param(words[1], words[2:], id=f"{path.name}: {' '.join(words[1:])}")


@pytest.mark.parametrize(("script", "arguments"), list(script_lines()))
def test_commands_in_the_documents_compose(script, arguments):
    flags = [word for word in arguments if word.startswith("-")]
    assert set(flags) <= {"-m", "--multirun", "--help"}
    overrides = [word for word in arguments if not word.startswith("-")]
    check_overrides(overrides, script.removesuffix(".py"), ROOT / "conf")
    sweeps = [word for word in overrides if "," in word.partition("=")[2] and "[" not in word]
    assert not sweeps or flags, f"{sweeps[0]} is a sweep and needs -m"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_other_commands_name_files_that_exist(path):
    for words in commands(path):
        for word in words:
            if word.endswith(".py") or word.startswith(("benchmarks/", "tests/", "notebooks/")):
                assert (ROOT / word).exists(), f"{path.name}: {' '.join(words)}"
        if words[:2] == ["python", "-m"] and words[2].startswith("marginclip"):
            assert (ROOT / "src" / Path(*words[2].split(".")) / "__main__.py").exists()


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="README.md is not written yet")
def test_the_readme_shows_the_two_commands():
    lines = [" ".join(words) for words in commands(ROOT / "README.md")]
    assert "python defend.py attack=badnet defense=mmdf" in lines
    assert any(line.startswith("pip install -e") for line in lines)
    assert "pytest" in lines


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_figures_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    missing = [target for target in targets if "://" not in target and not target.startswith(("#", "mailto:"))]
    missing = [target for target in missing if not (path.parent / target.partition("#")[0]).exists()]
    assert missing == []


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "docs" / "your-model.md", ROOT / "docs" / "audit.md"], ids=lambda path: path.name
)
def test_python_in_the_documents_runs(path, tmp_path, monkeypatch):
    """Block by block, in one namespace that holds what a reader has: a network, clean images with their labels, new images."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)).eval()
    images = torch.rand(160, 3, 8, 8)
    has = {"network": network, "model": network, "images": images, "new_images": torch.rand(30, 3, 8, 8)}
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)
    assert blocks
    for block in blocks:
        has["labels"] = has["model"](images).argmax(1)
        exec(block, has)
    assert has["detection"].decisions.shape == (30,)
    if (tmp_path / "repaired.pt2").exists():
        again = torch.export.load(tmp_path / "repaired.pt2").module()
        torch.testing.assert_close(again(images), has["repaired"](images))
        assert torch.equal(has["detector"](has["new_images"]).flagged, has["detection"].flagged)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_placeholder_was_left(path):
    assert not re.findall(r"@@\w+@@|\bTODO\b|\bTBD\b", path.read_text())


def public_without_docstring(path):
    """Modules, classes and functions at the top of a module, by their place; ``__init__.py`` may be empty."""
    tree = ast.parse(path.read_text())
    if tree.body and ast.get_docstring(tree) is None:
        yield "the module"
    for node in tree.body:
        named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if named and not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield f"{node.name} (line {node.lineno})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_public_names_have_docstrings(path):
    assert list(public_without_docstring(path)) == []
