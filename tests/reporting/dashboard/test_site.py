"""The files of a dashboard, without a browser: links, policy, hostile texts, sizes; and what is refused."""

import base64
import hashlib
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from marginclip.errors import UserError
from marginclip.reporting.__main__ import main
from marginclip.reporting.dashboard import write_dashboard
from marginclip.reporting.dashboard.repeat import repeat_command
from marginclip.reporting.dashboard.runs import read_runs
from marginclip.reporting.dashboard.site import MARK
from marginclip.reporting.dashboard.sweeps import read_sweeps
from marginclip.reporting.dashboard.victims import victims

RUN = "cifar10-resnet18-badnet-mmdf-seed0"


class Reader(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self):
        super().__init__()
        self.elements, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        self.text += " " if tag in ("th", "td", "p", "h2", "h3", "li", "pre", "summary") else ""


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_every_link_script_and_picture_of_the_folder_exists(site):
    for path in site.rglob("*.html"):
        for _, attributes in read(path).elements:
            for key in ("href", "src"):
                target = unquote((attributes.get(key) or "").partition("#")[0])
                if target and not target.startswith("data:"):
                    assert (path.parent / target).is_file(), f"{path.name}: {target}"


def test_no_page_asks_for_anything_outside_or_has_a_script_of_its_own(site):
    for path in site.rglob("*.html"):
        for tag, attributes in read(path).elements:
            assert not [key for key in attributes if key.startswith("on") or key == "style"], path.name
            assert tag != "script" or attributes.get("type") == "application/json" or "src" in attributes
            assert not re.match(r"(https?:)?//", attributes.get("src") or attributes.get("href") or "")
        (policy,) = [each["content"] for _, each in read(path).elements if each.get("http-equiv") == "Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")


def test_the_single_file_allows_its_own_scripts_alone(single):
    text = single.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1).replace("&#39;", "'")
    inline = re.findall(r"<script>(.*?)</script>", text, flags=re.S) + re.findall(r"<style>(.*?)</style>", text, flags=re.S)
    hashes = {base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in inline}
    assert hashes == set(re.findall(r"'sha256-([^']+)'", policy))
    assert "unsafe" not in policy
    without_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert [found for found in re.findall(r".{20} src=", without_scripts) if "&lt;img src=" not in found] == []


def test_hostile_names_are_text(site, hostile_text):
    (path,) = (site / "run").glob("img-src*.html")
    page = read(path)
    assert page.text.count(hostile_text) > 5  # a count, because pytest would compare whole pages letter by letter
    assert read(site / "index.html").text.count(hostile_text) == 3  # the name and the version of a package, a cell's error
    assert [attributes for tag, attributes in page.elements if tag == "img"] == []
    names = [attributes.get("src") or "json" for tag, attributes in page.elements if tag == "script"]
    assert names == ["../assets/datatables.js", "../assets/chart.js", "../assets/dashboard.js", "json"]


def test_the_overview_tells_what_is_missing(site):
    text = " ".join(read(site / "index.html").text.split())
    assert text.count("67 runs below") == 1
    assert text.count("1 failed 0 running 2 missing of a sweep 1 cannot be read") == 1
    assert re.findall(r"missing marginclip defend (seed=\d)", text) == ["seed=1", "seed=3"]
    assert text.count("no memory") == 1


def test_the_table_of_all_runs_holds_the_records_figures(site, records):
    content = (site / "assets" / "table.js").read_text(encoding="utf-8")
    table = json.loads(json.loads(content.removeprefix("window.marginclipTable = ").rstrip().removesuffix(";")))
    rows = table["rows"]
    for number, run in enumerate(rows["run"]):
        record = records.get(table["runs"]["name"][run])
        if record is not None and rows["main"][number]:
            found = record.metrics[record.choice("defense")]
            assert rows["figures"]["ACC"][number] == pytest.approx(found["acc"], abs=1e-5)
            label = rows["method"]["values"][rows["method"]["index"][number]]
            assert label == record.rows[record.choice("defense")].label
    setting = table["settings"]["attack.name"]
    wanted = [records[name].choice("attack") for name in table["runs"]["name"] if name in records]
    found = [
        setting["values"][code] for code, name in zip(setting["index"], table["runs"]["name"], strict=True) if name in records
    ]
    assert found == wanted


def test_the_papers_figures_stand_beside_runs_of_their_setting_alone(site):
    badnet = (site / "run" / "cifar10-resnet18-badnet-mmdf-seed0.html").read_text(encoding="utf-8")
    assert (badnet.count("0.09 ± 0.14"), badnet.count("figures (arXiv 2308.04617, Table 1)")) == (1, 1)
    sinusoid = (site / "run" / "cifar10-resnet18-sinusoid-mmdf-seed0.html").read_text(encoding="utf-8")
    assert sinusoid.count("arXiv") == 0


def test_sweeps_and_victims_by_hand(runs_dir):
    runs, unreadable = read_runs(runs_dir)
    assert len(unreadable) == 1 and "unreadable" in unreadable[0]
    (sweep,) = read_sweeps(runs_dir, runs)
    assert [cell.status for cell in sweep.cells] == ["done", "missing", "failed", "missing"]
    first = victims(runs)[0]
    assert first.name == "cifar10-resnet18-badnet-seed0"
    assert sorted(run.record.choice("defense") for run in first.runs) == ["finetune", "ibau", "mmdf", "nad", "static_clip"]


def test_a_cell_that_runs_or_that_a_later_sweep_did_is_not_missing(tmp_path, synthetic):
    (place,) = synthetic.write_runs(tmp_path, 1)
    first, later = tmp_path / "sweeps" / "1", tmp_path / "sweeps" / "2"
    outcome = {"error": None, "record": str(place / "run.json")}
    for folder, asked in ((first, ["seed=0", "seed=1", "seed=2", "seed=3"]), (later, ["seed=1", "seed=3"])):
        folder.mkdir(parents=True)
        (folder / "sweep.json").write_text(json.dumps({"asked": asked}))
    for job, content in (
        (first / "1", {"outcome.json": {"overrides": "seed=1", "error": "a full disk", "record": None}}),
        (first / "2", {"alive.json": {"seen": time.time() - 5}}),
        (first / "3", {"alive.json": {"seen": time.time() - 3600}}),
        (later / "0", {"outcome.json": outcome | {"overrides": "seed=1"}}),
    ):
        job.mkdir()
        for name, values in content.items():
            (job / name).write_text(json.dumps(values))
    earlier, _ = read_sweeps(tmp_path, read_runs(tmp_path)[0])
    assert [cell.status for cell in earlier.cells] == ["missing", "done", "running", "missing"]
    assert [cell.number for cell in earlier.cells] == [0, 1, 2, 3]
    assert earlier.cells[1].run.record.folder == place


@pytest.mark.parametrize(
    ("order", "command", "status"), [("12", "defend", "done"), ("21", "defend", "missing"), ("12", "train", "missing")]
)
def test_only_a_later_sweep_of_the_same_command_does_a_missing_cell(tmp_path, synthetic, order, command, status):
    (place,) = synthetic.write_runs(tmp_path, 1)
    missed, did = (tmp_path / "sweeps" / name for name in order)
    for folder, told in ((missed, "defend"), (did, command)):
        folder.mkdir(parents=True)
        (folder / "sweep.json").write_text(json.dumps({"command": told, "asked": ["seed=1"]}))
    (did / "0").mkdir()
    outcome = {"overrides": "seed=1", "error": None, "record": str(place / "run.json")}
    (did / "0" / "outcome.json").write_text(json.dumps(outcome))
    cells = {sweep.place: sweep.cells[0].status for sweep in read_sweeps(tmp_path, read_runs(tmp_path)[0])}
    assert cells == {f"sweeps/{order[0]}": status, f"sweeps/{order[1]}": "done"}


def test_the_overview_tells_mixed_settings_versions_and_devices(tmp_path, two_seeds):
    """Two seeds of one row, of which one has another rate, another torch and another device."""
    _, other = two_seeds
    other.config["attack"]["rate"] = other.identity["attack"]["rate"] = 0.25
    other.versions["torch"], other.device.name = "2.5.0", "another"
    other.write()
    index = write_dashboard(tmp_path / "runs", tmp_path / "site", pictures=False)
    text = " ".join(read(index).text.split())
    _, _, told = text.partition("Mixed settings")
    notes, _, made_with = told.partition("Versions and devices")
    assert notes.count("attack.rate") >= 1 and "differ in their seed alone" not in notes
    assert "torch 2.6.0 1, 2.5.0 1 mixed" in made_with
    assert "device cpu: made up, 1 thread 1, cpu: another, 1 thread 1 mixed" in made_with
    assert re.search(r"lightning 2\.6\.0 2(?! mixed)", made_with)


def test_the_page_of_a_run_holds_what_its_record_does(site, records):
    record = records[RUN]
    text = " ".join(read(site / "run" / f"{RUN}.html").text.split())
    own, given = record.metrics["mmdf"], record.metrics["none"]
    (figures,) = re.findall(r"Figures method (.*?) Small: the paper's", text)
    assert f"no defense {100 * given['acc']:.1f}" in figures and f"MMDF {100 * own['acc']:.1f}" in figures
    for number, name in enumerate(record.classes):
        shares = " ".join(f"{100 * record.per_class[row][number]:.1f}" for row in ("none", "mmdf"))
        assert f" {name} {shares} " in text
    arrays = load_file(record.folder / "arrays.safetensors")
    stage = "004_layer4_act"
    medians = " ".join(
        f"{np.median(arrays[f'activations/{stage}/{key}']):.4g}" for key in ("clean_max", "triggered_max", "upper")
    )
    above = float(np.mean(arrays[f"activations/{stage}/clean_max"] > arrays[f"activations/{stage}/upper"]))
    assert f" {stage} 16 {medians} {100 * above:.1f} " in text
    assert f"Do it again {repeat_command(record)} Copy" in text
    assert "Resolved configuration seed: 0 clean_per_class: auto dataset: name: cifar10" in text
    data = json.loads((site / "run" / f"{RUN}.html").read_text().partition('class="data">')[2].partition("</script>")[0])
    curve = next(each for each in data["learning"] if each["unit"] == "λ")
    assert curve["values"] == [pytest.approx(entry["lambda"], rel=1e-3) for entry in record.history]
    victim = "cifar10-resnet18-badnet-seed0"
    first = records[RUN.replace("mmdf", "finetune")].metrics["none"]  # the first of its runs, by name
    row = text_of_row(site / "victims.html", victim)
    assert row.startswith(f"{victim} cifar10, resnet18, badnet all2one 0 trained {100 * first['acc']:.1f} 99.0 5 ")


def text_of_row(path, name):
    """The text of the row of a table that begins with a name."""
    (found,) = re.findall(rf'<tr><th scope="row">{re.escape(name)}</th>.*?</tr>', path.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", found).split())


def test_the_most_extreme_images_have_their_statistic(tmp_path, synthetic):
    """Twenty-four flagged and twenty-four missed images, in the order of the arrays, and the ninth of each by its pixels."""
    (place,) = synthetic.write_runs(tmp_path / "runs", 1)
    arrays = load_file(place / "arrays.safetensors")
    statistic = {"caught": np.linspace(30, 20, 24, dtype=np.float32), "missed": np.linspace(-3, 2, 24, dtype=np.float32)}
    images = np.arange(48, dtype=np.uint8).reshape(48, 1, 1, 1) * np.ones((1, 3, 8, 8), np.uint8)
    for start, (group, values) in zip((0, 24), statistic.items(), strict=True):
        found = {"images": images[start : start + 24], "statistic": values, "labels": np.full(24, 3)}
        arrays |= {f"extremes/mmdf/{group}/{key}": each for key, each in found.items()}
    save_file(arrays, place / "arrays.safetensors")
    site = write_dashboard(tmp_path / "runs", tmp_path / "site").parent
    (path,) = (site / "run").glob("*.html")
    tiles = re.findall(r"<span>cat <b>([^<]*)</b></span>", path.read_text())
    assert tiles == [f"{value:.3g}" for group in statistic.values() for value in group]
    assert len(re.findall(r"<h3>Triggered images that were (?:flagged|missed)", path.read_text())) == 2
    sheet = np.asarray(Image.open(next((site / "pictures").iterdir())))
    assert sheet.shape == (4 * 8, 12 * 8, 3)
    assert (sheet[0, 8 * 8].tolist(), sheet[2 * 8, 8 * 8].tolist()) == ([8] * 3, [32] * 3)


def test_slugs_are_plain_and_differ(runs_dir):
    slugs = [run.slug for run in read_runs(runs_dir)[0]]
    assert len(set(slugs)) == len(slugs)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", slug) for slug in slugs)


def test_the_sheet_of_pictures_holds_every_tile(site):
    (sheet,) = (site / "pictures").iterdir()
    assert Image.open(sheet).size == (12 * 6, 6)  # four clean, four triggered, four missed images of 6 x 6 pixels


def test_a_page_of_a_run_is_small(site):
    """Five hundred of them stay under the 10 MB of a dashboard, with room for what all pages share."""
    sizes = [path.stat().st_size for path in (site / "run").glob("cifar10-*.html")]
    assert sum(sizes) / len(sizes) < 17_500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "there is no folder"),
        (["runs", "--single-file"], "--single-file needs --html DIR"),
        (["runs", "--no-pictures"], "--no-pictures needs --html DIR_OR_FILE"),
        (["runs", "--html", "runs"], "holds files that are no dashboard"),
        (["runs", "--html", "file"], "is a file"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, synthetic, arguments, message):
    monkeypatch.chdir(tmp_path)
    synthetic.write_runs(tmp_path / "runs", 1)
    (tmp_path / "file").write_text("")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_dashboard_is_replaced_and_pictures_can_be_left_out(tmp_path, synthetic):
    runs, site = tmp_path / "runs", tmp_path / "site"
    first, *_ = synthetic.write_runs(runs, 2)
    index = write_dashboard(runs, site)
    shutil.copytree(first, runs / "another")
    assert write_dashboard(runs, site, pictures=False) == index
    assert (site / "run" / "another.html").exists()
    shutil.rmtree(runs / "another")
    write_dashboard(runs, site)
    assert not (site / "run" / "another.html").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "site"}
    assert write_dashboard(runs, site, single_file=True).stat().st_size > 300_000
    assert {path.name for path in site.iterdir()} == {"index.html", MARK}
    with pytest.raises(UserError, match=r"there is no run\.json"):
        write_dashboard(site, tmp_path / "other")


def test_a_page_in_a_folder_does_not_make_it_a_dashboard(tmp_path, synthetic):
    synthetic.write_runs(tmp_path / "runs", 1)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "thesis.tex").write_text("years of work")
    write_dashboard(tmp_path / "runs", tmp_path / "site" / "index.html")
    for single_file in (False, True):
        with pytest.raises(UserError, match="holds files that are no dashboard"):
            write_dashboard(tmp_path / "runs", tmp_path / "site", single_file=single_file)
    assert files(tmp_path / "site") == {"thesis.tex", "index.html"}


def test_what_somebody_put_beside_the_pages_stays(tmp_path, synthetic):
    synthetic.write_runs(tmp_path / "runs", 1)
    site = tmp_path / "site"
    write_dashboard(tmp_path / "runs", site)
    own = {"notes.txt", "run/notes.txt", "mine/pages.html"}
    (site / "mine").mkdir()
    for name in own:
        (site / name).write_text("mine")
    write_dashboard(tmp_path / "runs", site)
    write_dashboard(tmp_path / "runs", site, single_file=True)
    assert files(site) == own | {"index.html", MARK}
    (site / "pivot.html").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'pivot\.html', which is not of the dashboard"):
        write_dashboard(tmp_path / "runs", site)
    assert files(site) == own | {"index.html", "pivot.html", MARK}


@pytest.mark.parametrize("content", ["", "thesis.tex", "1", "[1]"])
def test_a_dashboard_without_a_list_of_its_files_is_left_alone(tmp_path, synthetic, content):
    """That of an earlier version, whose folder can hold anything."""
    synthetic.write_runs(tmp_path / "runs", 1)
    (tmp_path / "site").mkdir()
    for name in ("index.html", "thesis.tex"):
        (tmp_path / "site" / name).write_text("")
    (tmp_path / "site" / MARK).write_text(content)
    with pytest.raises(UserError, match="holds a dashboard that does not list its files"):
        write_dashboard(tmp_path / "runs", tmp_path / "site")
    assert files(tmp_path / "site") == {"index.html", "thesis.tex", MARK}


def test_a_list_that_leads_out_of_the_folder_removes_nothing_there(tmp_path, synthetic):
    synthetic.write_runs(tmp_path / "runs", 1)
    site, away = tmp_path / "site", tmp_path / "away"
    for folder in (site, away):
        folder.mkdir()
    (away / "thesis.tex").write_text("years of work")
    (site / "link").symlink_to(away)
    (site / MARK).write_text(json.dumps(["../away/thesis.tex", str(away / "thesis.tex"), "link/thesis.tex", "", ".", ".."]))
    write_dashboard(tmp_path / "runs", site)
    assert (away / "thesis.tex").exists() and (site / "link").exists()


def test_a_move_that_was_cut_off_is_finished_by_the_next(tmp_path, synthetic, monkeypatch):
    synthetic.write_runs(tmp_path / "runs", 1)
    site, moved, replace = tmp_path / "site", [], Path.replace

    def cut(source, place):
        moved.append(place)
        if len(moved) == 5:
            raise KeyboardInterrupt
        return replace(source, place)

    with monkeypatch.context() as changed:
        changed.setattr(Path, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            write_dashboard(tmp_path / "runs", site)
    write_dashboard(tmp_path / "runs", site)
    whole = write_dashboard(tmp_path / "runs", tmp_path / "whole").parent
    assert files(site) == files(whole)


def test_the_dashboard_can_be_the_folder_of_the_command(tmp_path, synthetic, monkeypatch):
    synthetic.write_runs(tmp_path / "runs", 1)
    (tmp_path / "site").mkdir()
    monkeypatch.chdir(tmp_path / "site")
    for _ in range(2):
        assert write_dashboard(tmp_path / "runs", Path()).exists()
