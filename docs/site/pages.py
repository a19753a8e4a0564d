"""What the site does with the repository: pages from files outside docs/, notebooks as pages, and links that lead out of docs/."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

import nbformat
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
IN_MENU = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
TOP = (*IN_MENU, "CODE_OF_CONDUCT.md", "SECURITY.md")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(```.*?```)", flags=re.S)


def on_files(files: Files, config) -> Files:
    """Add the pages that do not lie in docs/."""
    for name in TOP:
        if (ROOT / name).exists():
            level = InclusionLevel.UNDEFINED if name in IN_MENU else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, name, content=(ROOT / name).read_text(), inclusion=level))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Turn links as the repository has them into links of the site; code blocks stay as they are."""
    place = source_of(page.file.src_uri)
    parts = FENCE.split(markdown)
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda link: relinked(link, place, page, files), part) for part in parts
    )


def source_of(uri: str) -> str:
    """Where in the repository the source of a page lies."""
    if uri in TOP:
        return uri
    return uri.removesuffix(".md") + ".ipynb" if uri.startswith("notebooks/") else f"docs/{uri}"


def relinked(link: re.Match[str], place: str, page, files: Files) -> str:
    """A link to a page of the site as such; one to another file of the repository as its text alone."""
    image, text, target = link.groups()
    path, hash_, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return link[0]
    full = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
    uri = full.removeprefix("docs/")
    if uri.startswith("notebooks/"):
        uri = uri.removesuffix(".ipynb") + ".md"
    if files.get_file_from_path(uri) is not None:
        return f"{image}[{text}]({os.path.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{hash_}{anchor})"
    return text if (ROOT / full).exists() else link[0]


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its texts, its code, and what the code printed."""
    notebook = nbformat.read(path, as_version=4)
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        printed = "".join(output.get("text", "") for output in cell.get("outputs", []))
        if printed:
            parts.append(f"```text\n{printed}```")
    return "\n\n".join(parts)
