"""The import arrows of CONTRIBUTING.md: they point down only, and the core needs nothing of ours."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "marginclip"
# Part -> the other parts of the package that it may import.
ARROWS = {
    "allocator": set(),
    "errors": set(),
    "durations": set(),
    "signals": set(),
    "sweep_files": set(),
    "silence": {"signals"},
    "locks": {"errors", "files"},
    "identity": set(),
    "record": {"files", "errors"},
    "devices": set(),
    "files": {"errors"},
    "precision": {"devices", "errors"},
    "networks": {"errors"},
    "clipping": {"networks", "errors"},
    "maxmargin": {"networks", "errors"},
    "metrics": {"errors"},
    "models": {"networks", "errors"},
    "losses": {"devices", "errors"},
    "attacks": {"identity", "maxmargin", "networks", "errors"},
    "data": {"attacks", "devices", "files", "identity", "locks", "errors"},
    "defenses": {"clipping", "networks", "maxmargin", "metrics", "precision", "signals", "silence", "errors"},
    "training": {"attacks", "clipping", "networks", "losses", "maxmargin", "metrics", "errors"},
    "evaluation": {"maxmargin", "metrics", "errors"},
    "service": {
        "durations",
        "clipping",
        "data",
        "defenses",
        "files",
        "maxmargin",
        "metrics",
        "networks",
        "reporting",
        "silence",
        "errors",
    },
    "reporting": {"record", "errors", "files", "sweep_files"},
    "cli": {"__version__", "errors", "experiment", "reporting", "signals"},
    "__main__": {"cli"},
    "api": {"clipping", "defenses", "networks", "precision", "silence", "errors"},
    "__init__": {"api", "clipping", "defenses", "maxmargin", "service", "errors"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def below_experiment():
    return [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in FILES if part_of(path) != "experiment"]


def imports(path):
    """Every module that a file imports, at whatever place in it: (name, line)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def own(path):
    """The parts of the package that a file imports, but its own."""
    found = {(name.split(".")[1], line) for name, line in imports(path) if name.startswith("marginclip.")}
    return {(part, line) for part, line in found if part != part_of(path)}


@pytest.mark.parametrize("path", below_experiment())
def test_arrows_point_down(path):
    part = part_of(path)
    assert part in ARROWS, f"say in ARROWS and CONTRIBUTING.md what '{part}' may import"
    for imported, line in own(path):
        assert imported in ARROWS[part], f"{path.name}:{line}: {part} must not import {imported}"


def test_the_arrows_are_seen():
    """The reading above does find imports, including those inside functions."""
    assert {part for part, _ in own(PACKAGE / "experiment" / "victim.py")} >= {"evaluation", "training"}
    assert "reporting" in {part for part, _ in own(PACKAGE / "experiment" / "command.py")}
    assert len(FILES) > 30


def test_core_needs_torch_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "marginclip"}
    for path in [file for part in ("maxmargin", "clipping", "networks") for file in (PACKAGE / part).glob("*.py")]:
        assert {name.split(".")[0] for name, _ in imports(path)} <= allowed, path


def test_hydra_ends_at_experiment():
    for path in FILES:
        if part_of(path) != "experiment":
            assert not {name.split(".")[0] for name, _ in imports(path)} & {"hydra", "omegaconf"}, path


@pytest.mark.parametrize("module", ["marginclip", "marginclip.cli", "marginclip.experiment.command"])
def test_command_line_starts_without_torch(module):
    heavy = "{'torch', 'lightning', 'wandb', 'matplotlib'}"
    code = f"import sys, {module}; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
