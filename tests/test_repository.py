"""The files around the code: they parse, and they say what pyproject.toml and .ci/run say."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path):
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]["text"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    identifiers = {one["identifiers"][0]["value"] for one in citation["references"]}
    assert all(value.removeprefix("arXiv:") in (ROOT / "README.md").read_text() for value in identifiers)


def test_hosted_ci_does_what_ci_run_does():
    hosted = {
        command.strip()
        for step in steps(ROOT / ".github" / "workflows" / "ci.yml")
        for command in step.get("run", "").splitlines()
    }
    here = (ROOT / ".ci" / "run").read_text()
    for command in ('pip install -e ".[dev]" && pytest', "ruff check .", "ruff format --check .", "mypy", "sh .ci/lowest"):
        assert command in hosted
        assert command.removeprefix("pip install ") in here


def test_hosted_ci_has_the_lowest_python():
    matrix = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"][0] == PROJECT["requires-python"].removeprefix(">=")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_what_there_is(path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for step in steps(path):
        for command in step.get("run", "").splitlines():
            if command.startswith("make "):
                assert command.split()[1] in targets
            if command.startswith("sh "):
                assert (ROOT / command.split()[1]).is_file()


def test_the_container_runs_the_main_job():
    command = re.search(r"^CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), flags=re.M)
    assert yaml.safe_load(command[1])[:3] == ["defend", "attack=badnet", "defense=mmdf"]


def test_the_changelog_has_an_entry_for_what_comes():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert headings[0] == "Unreleased"
