"""Writing the pages: a folder of them, or one file."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from marginclip.errors import UserError, require
from marginclip.files import partial_of, remove_left_folders, write_json, write_whole
from marginclip.reporting.dashboard.overview import STATUSES, overview
from marginclip.reporting.dashboard.pictures import sheet
from marginclip.reporting.dashboard.run_page import figure, run_content
from marginclip.reporting.dashboard.runs import Run, read_runs
from marginclip.reporting.dashboard.table import table
from marginclip.reporting.dashboard.thresholds import detections, roc
from marginclip.reporting.dashboard.victims import victims
from marginclip.reporting.figures import read_arrays

HERE = Path(__file__).parent
LIBRARIES = ("vendor/datatables.js", "vendor/chart.js")
OWN = tuple(f"static/{name}.js" for name in ("site", "export", "charts", "table", "pivot", "runs", "compare", "run"))
ASSETS = (*(Path(name).name for name in LIBRARIES), "dashboard.js")
STYLE = "static/dashboard.css"
PAGES = {"index": "Overview", "pivot": "Pivot", "runs": "Runs", "compare": "Compare", "victims": "Victims"}
WITH_TABLE = ("pivot", "runs", "compare")
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'"
MARK = ".marginclip-dashboard"  # in the folder of a dashboard: the names of its files, which alone are replaced


@dataclass(frozen=True)
class Page:
    """A page without its frame: its ``name`` (``index``, ``run/<slug>``), its title, and the content of its main part."""

    name: str
    title: str
    content: Markup


@dataclass(frozen=True)
class Form:
    """How pages refer to each other and to pictures: as files beside them, or within one file."""

    single: bool

    def link(self, page: str, root: str = "") -> str:
        """The address of a page, from one whose way to the top is ``root``."""
        return f"#{page}" if self.single else f"{root}{page}.html"

    def picture(self, slug: str, png: bytes) -> str:
        """The address of the sheet of a run, from its page."""
        return f"data:image/png;base64,{base64.b64encode(png).decode()}" if self.single else f"../pictures/{slug}.png"


def write_dashboard(runs_dir: Path, target: Path, *, single_file: bool = False, pictures: bool = True) -> Path:
    """Write the dashboard of all runs below ``runs_dir``; returns the file to open.

    ``target`` is a folder, or a file whose name ends in ``.html``, which takes everything; with ``single_file`` a folder takes one file,
    too. The files of an earlier dashboard are replaced, and no others. Raises :class:`UserError` where there is no run to show, and where
    ``target`` is a folder that holds something else.
    """
    require(runs_dir.is_dir(), f"there is no folder '{runs_dir}'")
    runs, unreadable = read_runs(runs_dir)
    require(bool(runs), f"there is no run.json that can be read in '{runs_dir}' or below it")
    if target.suffix.lower() in (".html", ".htm"):
        require(not target.is_dir(), f"--html must be a file or a folder, but '{target}' is a folder with the name of a file")
        return _write_single(target, runs_dir, runs, unreadable, pictures)
    require(
        not target.exists() or target.is_dir(),
        f"--html must be a folder or a name that ends in .html, but '{target}' is a file",
    )
    _own_files(target)
    return _write_folder(target, runs_dir, runs, unreadable, single_file, pictures)


# -- a folder -----------------------------------------------------------------------------------------------------------------


def _write_folder(
    target: Path, runs_dir: Path, runs: list[Run], unreadable: list[str], single_file: bool, pictures: bool
) -> Path:
    partial_folder = partial_of(target.absolute())
    remove_left_folders(target.absolute())
    try:
        partial_folder.mkdir(parents=True)
        if single_file:
            _write_single(partial_folder / "index.html", runs_dir, runs, unreadable, pictures)
        else:
            _fill(partial_folder, runs_dir, runs, unreadable, pictures)
        _move(partial_folder, target)
    except OSError as error:
        raise UserError(f"--html='{target}' cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return target / "index.html"


def _own_files(target: Path) -> set[str]:
    """The files of the dashboard in ``target``, as its mark lists them; raises :class:`UserError` where the folder holds something else."""
    if not target.is_dir() or not any(target.iterdir()):
        return set()
    require(
        (target / MARK).exists(),
        f"--html='{target}' holds files that are no dashboard; give an empty folder, or one that does not exist yet",
    )
    try:
        names = json.loads((target / MARK).read_text())
        files = {name: target / name for name in names if (target / name).is_file()}
        return {name for name, file in files.items() if file.parent.resolve().is_relative_to(target.resolve())}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--html='{target}' holds a dashboard that does not list its files, as earlier versions wrote it; give another folder, or "
            "remove this one where it holds nothing else"
        ) from error


def _move(source: Path, target: Path) -> None:
    """Move the files of ``source`` into ``target``, in the place of those of an earlier dashboard; nothing else is touched.

    At any time the mark lists every file of either dashboard that is there.
    """
    old = _own_files(target)
    new = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    for name in sorted(new - old):
        fault = f"--html='{target}' holds '{name}', which is not of the dashboard; give another folder"
        require(not (target / name).exists(), fault)
    write_json(target / MARK, sorted(old | new))
    for name in sorted(new):
        (target / name).parent.mkdir(exist_ok=True)
        (source / name).replace(target / name)
    for name in old - new:
        (target / name).unlink(missing_ok=True)
    for folder in {(target / name).parent for name in old - new} - {target}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    write_json(target / MARK, sorted(new))


def _fill(folder: Path, runs_dir: Path, runs: list[Run], unreadable: list[str], pictures: bool) -> None:
    _write_assets(folder / "assets")
    (folder / "pictures").mkdir()
    (folder / "run").mkdir()
    environment, data = make_environment(Form(single=False)), dict[str, Any]()
    for page, png in _pages(environment, Form(single=False), runs_dir, runs, unreadable, pictures, data):
        root = "../" if "/" in page.name else ""
        names = ["table.js", *ASSETS] if page.name in WITH_TABLE else ASSETS
        text = environment.get_template("page.html").render(
            page=page,
            root=root,
            scripts=[f"{root}assets/{name}" for name in names],
            style=f"{root}assets/{Path(STYLE).name}",
            policy=POLICY,
        )
        _write_text(folder / f"{page.name}.html", text)
        if png is not None:
            (folder / "pictures" / f"{Path(page.name).name}.png").write_bytes(png)
    content = json.dumps(data["table"], separators=(",", ":"), allow_nan=False)
    _write_text(folder / "assets" / "table.js", f"window.marginclipTable = {json.dumps(content)};\n")


def _write_assets(folder: Path) -> None:
    """The libraries with their licences, our scripts as one, and the style."""
    folder.mkdir()
    for path in (HERE / "vendor").iterdir():
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(HERE / STYLE, folder / Path(STYLE).name)
    _write_text(folder / "dashboard.js", "\n".join((HERE / name).read_text(encoding="utf-8") for name in OWN))


# -- one file -----------------------------------------------------------------------------------------------------------------


def _write_single(target: Path, runs_dir: Path, runs: list[Run], unreadable: list[str], pictures: bool) -> Path:
    form, data = Form(single=True), dict[str, Any]()
    environment = make_environment(form)
    pages = [page for page, _ in _pages(environment, form, runs_dir, runs, unreadable, pictures, data)]
    scripts = [(HERE / name).read_text(encoding="utf-8") for name in (*LIBRARIES, *OWN)]
    style = (HERE / STYLE).read_text(encoding="utf-8")
    hashes = " ".join(_hash(script) for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    text = environment.get_template("single.html").render(
        pages=pages, table=data["table"], scripts=[Markup(script) for script in scripts], style=Markup(style), policy=policy
    )
    return write_whole(target, lambda path: _write_text(path, text))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")  # names of folders can hold undecodable bytes


# -- pages --------------------------------------------------------------------------------------------------------------------


def make_environment(form: Form) -> Environment:
    """Templates that escape everything, know how to link in this form, and fail where something is not given."""
    environment = Environment(
        loader=PackageLoader("marginclip.reporting.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "sort_keys": False}
    environment.globals |= {
        "link": form.link,
        "page_titles": PAGES,
        "statuses": STATUSES,
        "single": form.single,
        "figure": figure,
    }
    return environment


def _pages(
    environment: Environment,
    form: Form,
    runs_dir: Path,
    runs: list[Run],
    unreadable: list[str],
    pictures: bool,
    data: dict[str, Any],
) -> Iterator[tuple[Page, bytes | None]]:
    """The pages one by one, those of runs with their sheet of pictures; ``data`` gets the table of all runs before the others come."""
    curves: dict[str, Any] = {}
    shared: dict[str, list[Run]] = {}
    for run in runs:
        shared.setdefault(run.victim, []).append(run)
    render = partial(_render, environment)
    for run in runs:
        arrays = read_arrays(run.record.folder / "arrays.safetensors")
        found = detections(run.record, arrays)
        if found and (curve := roc(found[0])) is not None:
            curves[run.slug] = curve
        tiles = sheet(run.record, arrays) if pictures else None
        png = None if tiles is None else tiles.png()
        source = "" if png is None else form.picture(run.slug, png)
        others = [other for other in shared[run.victim] if other is not run]
        content = run_content(run, arrays, found, tiles) | {"source": source, "others": others, "pictures": pictures}
        yield render(f"run/{run.slug}", run.record.folder.name, "run.html", root="../", **content), png
    data["table"] = table(runs, curves)
    name = runs_dir.resolve().name
    yield (
        render("index", PAGES["index"], "overview.html", folder=name, runs=runs, found=overview(runs_dir, runs, unreadable)),
        None,
    )
    yield render("victims", PAGES["victims"], "victims.html", victims=victims(runs)), None
    for page in WITH_TABLE:
        yield render(page, PAGES[page], f"{page}.html"), None


def _render(environment: Environment, name: str, title: str, template: str, root: str = "", **content: Any) -> Page:
    return Page(name, title, Markup(environment.get_template(template).render(root=root, **content)))
