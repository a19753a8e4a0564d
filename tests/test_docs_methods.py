"""Every attack, defense and loss has its page, and the settings that a page shows are those of the option file.

A table of settings begins with ``| setting | default |``. A further column whose heading is an override shows the values with that
override. A default without code marks stands for everything below its key; the row "all others" names the page whose option has the same
values.
"""

import re
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
FOLDERS = {"attack": "attacks", "defense": "methods", "loss": "losses"}
ON_ANOTHER_PAGE = {"input_aware_small": "input_aware"}
WITHOUT_PAGE = {"none"}  # the absence of an attack or of a defense
NO_SETTINGS = {"name", "repaired_row", "detector_row", "_target_", "_partial_"}


def options(group):
    names = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} - WITHOUT_PAGE
    return sorted({ON_ANOTHER_PAGE.get(name, name) for name in names})


PAGES = [pytest.param(group, name, id=f"{group}={name}") for group in FOLDERS for name in options(group)]


def page_text(group, name):
    return (ROOT / "docs" / FOLDERS[group] / f"{name}.md").read_text()


@pytest.mark.parametrize(("group", "name"), PAGES)
def test_a_page_has_a_picture(group, name):
    assert re.search(r"!\[[^\]]+\]\(\.\./figures/\w+\.png\)", page_text(group, name))


def settings_table(text):
    """Heading cells and rows of cells of the table of settings."""
    (table,) = re.findall(r"^\| setting \| default \|.*\n(?:\|.*\n)+", text, flags=re.M)
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return heading, rows


@cache
def composed(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("defend", overrides=list(overrides))


def chosen(group, name, column):
    """The configuration of a column: the page's option, with the override in the column's heading."""
    override = column.strip("`")
    first = [] if override.startswith(f"{group}=") else [f"{group}={name}"]
    return composed(*first, *([] if column == "default" else [override]))


def leaves(config, prefix):
    """The settings below a key: dotted key -> value."""
    content = OmegaConf.to_container(config) if OmegaConf.is_dict(config) else config
    if not isinstance(content, dict):
        return {prefix: content}
    found = {}
    for key in content.keys() - NO_SETTINGS:
        found |= leaves(content[key], f"{prefix}.{key}")
    return found


def parsed(text):
    """The value that a cell shows; ``16/255`` is a number, and so is ``1e-05``, which YAML reads as text."""
    try:
        return float(Fraction(text))
    except ValueError:
        return yaml.safe_load(text)


def same(shown, value):
    """Whether a cell in code marks shows this value of an option file."""
    found = parsed(shown.strip("`"))
    if isinstance(found, float) and not isinstance(value, bool):
        return value == pytest.approx(found, rel=1e-12)
    return found == (OmegaConf.to_container(value) if OmegaConf.is_list(value) else value)


def test_the_reading_of_cells_is_right():
    assert same("`16/255`", 16 / 255)
    assert not same("`16/255`", 0.06)
    assert same("`null`", None)
    assert not same("`null`", 0.0)
    assert same("`true`", True)
    assert same("`1e-05`", 1e-5)
    assert same("`[0.5, 0.9]`", OmegaConf.create([0.5, 0.9]))
    heading, rows = settings_table("| setting | default | what it does |\n|---|---|---|\n| `a.b` | `1` | c |\n")
    assert (heading, rows) == (["setting", "default", "what it does"], [["`a.b`", "`1`", "c"]])


@pytest.mark.parametrize(("group", "name"), PAGES)
def test_the_option_has_its_page_in_the_menu(group, name):
    assert f"- {FOLDERS[group]}/{name}.md\n" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize(("group", "name"), PAGES)
def test_the_page_has_its_parts(group, name):
    text = page_text(group, name)
    assert f"`{group}={name}`" in text
    assert re.search(rf"^(python|marginclip) .*{group}=\S*{name}\b", text, flags=re.M), "no command runs it"
    for part in ("## The settings", "## The source"):
        assert part in text


@pytest.mark.parametrize(("group", "name"), PAGES)
def test_the_defaults_on_the_page_are_those_of_the_option_file(group, name):
    heading, rows = settings_table(page_text(group, name))
    for place, column in enumerate(heading[1:-1], start=1):
        config = chosen(group, name, column)
        for row in rows:
            key, cell = row[0].strip("`"), row[place]
            if cell.startswith("`"):
                assert same(cell, OmegaConf.select(config, key, throw_on_missing=True)), (column, key, cell)


@pytest.mark.parametrize(("group", "name"), PAGES)
def test_no_setting_is_left_out(group, name):
    _, rows = settings_table(page_text(group, name))
    shown = [row[0].strip("`") for row in rows]
    settings = leaves(composed(f"{group}={name}")[group], group)
    rest = {key: value for key, value in settings.items() if not any(key == one or key.startswith(f"{one}.") for one in shown)}
    if "all others" in shown:
        (other,) = re.findall(r"\]\((\w+)\.md\)", rows[shown.index("all others")][1])
        elsewhere = leaves(composed(f"{group}={other}")[group], group)
        assert rest == {key: elsewhere[key] for key in rest}
    else:
        assert {key for key in rest if (key, rest[key]) != (f"{group}.detector", None)} == set()


@pytest.mark.parametrize("group", FOLDERS)
def test_the_index_links_every_page(group):
    indices = {"attack": ["attacks"], "defense": ["peers", "longtail", "glossary"], "loss": ["longtail"]}
    text = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in indices[group])
    assert [name for name in options(group) if f"]({FOLDERS[group]}/{name}.md)" not in text] == []
