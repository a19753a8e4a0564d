"""The site builds without a warning, and its pages load nothing from other hosts."""

import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("mkdocs", reason='the site needs pip install -e ".[docs]"')
pytest.importorskip("material", reason='the site needs pip install -e ".[docs]"')
pytest.importorskip("mkdocstrings", reason='the site needs pip install -e ".[docs]"')

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parents[1]


def built(settings, folder):
    config = load_config(str(settings), site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built once; a broken link, anchor or reference, or a page that the menu lacks, would have raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        return built(ROOT / "mkdocs.yml", tmp_path_factory.mktemp("site"))


def pages(site):
    return [path for path in site.rglob("*.html") if path.name != "404.html"]


def test_every_document_is_a_page(site):
    documents = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    made = {path.relative_to(site) for path in pages(site)}
    assert documents <= made
    assert {Path("index.html"), Path("CONTRIBUTING.html"), Path("notebooks/repair_your_model.html")} <= made


def test_nothing_is_loaded_from_other_hosts(site):
    loads = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//|<link\b[^>]*\shref=["']?(?:https?:)?//"""
    )
    assert [path.name for path in pages(site) if loads.search(path.read_text())] == []
    assert not any('class="mermaid"' in path.read_text() for path in pages(site))  # would load a script
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"""@import|url\(["']?(?:https?:)?//""", styles)


def test_the_reference_has_arguments_and_no_raw_roles(site):
    text = (site / "api.html").read_text()
    assert text.index('id="marginclip.BoundLearning"') < text.index("offset_rate") < text.index('id="marginclip.MMAC"')
    assert ":class:" not in text
    assert ":func:" not in text


def test_a_broken_link_fails_the_build(tmp_path, monkeypatch):
    """The same rules on two pages of our own."""
    rules = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    settings = tmp_path / "mkdocs.yml"
    settings.write_text(yaml.safe_dump({key: rules[key] for key in ("site_name", "strict", "validation")}))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# A\n\n[b](b.md#there)\n")
    (docs / "b.md").write_text("# B\n\n## There\n")
    monkeypatch.chdir(tmp_path)
    built(settings, tmp_path / "site")
    (docs / "b.md").write_text("# B\n\n## Elsewhere\n")
    with pytest.raises(Abort):
        built(settings, tmp_path / "site")
