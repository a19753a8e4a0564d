"""Real Chromium opens every page from disk, offline: it sorts, filters, pivots and moves thresholds, and the figures are the records'."""

import csv
import io
import re
import time
from urllib.parse import quote

import numpy as np
import pytest
from safetensors.numpy import load_file

from marginclip.reporting.dashboard import write_dashboard

RUN = "cifar10-resnet18-badnet-mmdf-seed0"
PAGES = [
    "index.html",
    "pivot.html",
    "runs.html",
    f"compare.html#?run={RUN}&run=cifar10-resnet18-blend-nad-seed0",
    "victims.html",
]
OWN = {"mmdf": "MMDF", "static_clip": "static clip"}


def address(site, page):
    path, _, query = page.partition("#")
    return (site / path).as_uri() + (f"#{query}" if query else "")


@pytest.mark.parametrize("width", [320, 1600])
def test_every_page_fits_is_accessible_and_asks_for_nothing(site, open_page, width):
    """In light, and once in dark; a usual, a hostile and a failed run among them."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    hostile = next((site / "run").glob("img-src*.html")).stem
    runs = [RUN, hostile, "failed"]
    both = f"compare.html#?run={RUN}&run={hostile}"
    serious = []
    for page_name in (*PAGES, both, *(f"run/{name}.html" for name in runs)):
        page = open_page(address(site, page_name), width=width)
        dark = [("dark", ["color-contrast"])] if width == 1600 else []  # nothing but colours is another, at any width
        for look, rules in [("light", None), *dark]:
            page.emulate_media(color_scheme=look)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, page_name
            options = {"resultTypes": ["violations"], "preload": False} | ({"runOnly": rules} if rules else {})
            worst = [
                each
                for each in axe.run(page, options=options).response["violations"]
                if each["impact"] in ("serious", "critical")
            ]
            serious += [(page_name, look, each["id"], node["html"][:200]) for each in worst for node in each["nodes"]]
        assert page.evaluate("window.broken") is None
        page.close()
    assert serious == []


def test_no_page_fails_or_asks_for_anything(site, open_page, records):
    """Every page of the folder; of the runs of one defense that ended alike, the first."""
    page = open_page(address(site, "index.html"))
    every = set(site.rglob("*.html"))
    runs = {path.stem: path for path in every if path.parent.name == "run"}
    kinds: dict[tuple, str] = {}
    for name, record in sorted(records.items()):
        kinds.setdefault((record.choice("defense"), record.status), name)
    alike = {runs[name] for name in records.keys() - kinds.values() if name in runs}
    assert len(every) > 70 and len(kinds) >= 5
    for path in sorted(every - alike):
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]")


def names_in(page):
    return page.locator("#runs-table tbody td.run").all_inner_texts()


def settled(page, read, wanted, seconds=10):
    """What ``read()`` gives once it is ``wanted``, or else when the time is up: a table is drawn a moment after the click."""
    end = time.monotonic() + seconds
    while (found := read()) != wanted and time.monotonic() < end:
        page.wait_for_timeout(20)
    return found


def test_runs_sort_filter_and_show_other_columns(site, open_page, records):
    page = open_page(address(site, "runs.html"))
    page.get_by_label("Setting", exact=True).select_option("attack.name")
    page.get_by_label("Value", exact=True).select_option("badnet")
    wanted = {name: record for name, record in records.items() if record.choice("attack") == "badnet"}
    assert settled(page, lambda: set(names_in(page)), set(wanted)) == set(wanted)
    heading = page.locator("#runs-table th", has_text="ACC %").first
    heading.click()
    by_accuracy = sorted(wanted, key=lambda name: round(wanted[name].metrics[wanted[name].choice("defense")]["acc"], 5))
    assert settled(page, lambda: names_in(page), by_accuracy) == by_accuracy
    page.get_by_label("Search").fill("nad")
    left = {name for name in wanted if "-nad-" in name}
    assert settled(page, lambda: set(names_in(page)), left) == left
    page.get_by_text("Choose columns").click()
    page.get_by_label("Find a setting").fill("optimizer.lr")
    page.get_by_label("training.optimizer.lr").check()
    assert page.locator("#runs-table th", has_text="training.optimizer.lr").count() == 1
    page.get_by_role("button", name="Copy as CSV").click()
    rows = list(csv.reader(io.StringIO(page.get_by_label("The table as text").input_value())))
    assert {row[0] for row in rows[1:]} == set(wanted) and rows[0][-1] == "training.optimizer.lr"


def test_a_pivot_holds_means_over_seeds(site, open_page, records, spread):
    page = open_page(address(site, "pivot.html"))
    page.locator("#pivot-metric").select_option("ACC")
    counted = [record for record in records.values() if record.status == "done"]
    for defense, method in OWN.items():
        row = page.locator("#pivot-table tbody tr").filter(has=page.get_by_role("rowheader", name=method, exact=True))
        for column, attack in enumerate(page.locator("#pivot-table thead th").all_inner_texts()[1:]):
            same = [record for record in counted if record.choice("defense") == defense and record.choice("attack") == attack]
            cell = row.locator("td").nth(column)
            if same:
                values = [100 * record.metrics[defense]["acc"] for record in same]
                numbers = [float(part) for part in cell.locator("a").inner_text().split(" ± ")]
                assert numbers == pytest.approx(spread(values), abs=0.051)
                assert f"n={len(same)}" in cell.inner_text()


def test_the_threshold_moves_and_its_figures_are_exact(site, open_page, records, runs_dir):
    page, record = open_page(address(site, f"run/{RUN}.html")), records[RUN]
    arrays = load_file(runs_dir / RUN / "arrays.safetensors")
    metrics = record.metrics["mmdf"]

    def shown():
        return {cell.get_attribute("data-figure"): cell.inner_text() for cell in page.locator("[data-figure]").all()}

    own = {"true": "tpr", "false": "fpr", "success": "asr", "restored": "pacc", "correct": "acc"}
    for figure, text in shown().items():
        assert float(text.split()[0]) == pytest.approx(100 * metrics[own[figure]], abs=0.006)
    slider = page.get_by_role("slider", name="Threshold")
    slider.focus()
    for key in ("ArrowLeft",) * 9:
        page.keyboard.press(key)
    threshold = page.evaluate("JSON.parse(document.querySelector('script.data').textContent).detections[0].thresholds")[
        int(slider.input_value())
    ]
    assert threshold < record.detector["threshold"]
    scores = {kind: arrays[f"scores/mmdf_{kind}"].astype(float) for kind in ("clean", "triggered")}
    found = {"true": np.mean(scores["triggered"] >= threshold), "false": np.mean(scores["clean"] >= threshold)}
    codes = arrays["outcomes/mmdf/triggered_success"]
    found["success"] = np.mean(np.where(scores["triggered"] >= threshold, codes // 2, codes % 2))
    for figure, share in found.items():
        assert float(shown()[figure].split()[0]) == pytest.approx(100 * share, abs=0.006)
    box = page.locator("canvas.histogram").bounding_box()
    page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
    assert float(page.get_by_label("Threshold (logits)").input_value()) > record.detector["threshold"]
    page.get_by_role("button", name="As in the run").click()
    assert float(page.get_by_label("Threshold (logits)").input_value()) == pytest.approx(record.detector["threshold"], rel=1e-4)


def test_the_single_file_holds_every_page(single, open_page, hostile_text):
    page = open_page(single.as_uri())
    for name in ("Pivot", "Runs", "Compare", "Victims", "Overview"):
        page.get_by_role("navigation").get_by_role("link", name=name).click()
        page.locator("h1", has_text=name).wait_for()
    badnet = quote('["attack.name","badnet"]')
    page.goto(f"{single.as_uri()}#pivot?metric=ACC&where={badnet}")
    page.wait_for_selector("#pivot-table tbody tr")
    assert page.locator("#pivot-table thead th").all_inner_texts()[1:] == ["badnet"]
    page.goto(f"{single.as_uri()}#runs")
    page.get_by_label("Search").fill("onerror")
    page.locator("#runs-table td.run a").click()
    page.wait_for_selector("#figures")
    assert page.locator("h1").evaluate("each => each.textContent").count(hostile_text) == 1
    shown = page.locator("main").evaluate("each => each.textContent")
    assert shown.count(hostile_text) > 5
    assert page.evaluate("window.broken") is None


def test_runs_are_chosen_and_compared_by_keyboard(site, open_page, records):
    page = open_page(address(site, "runs.html"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    for name in (RUN, "cifar10-resnet18-blend-nad-seed0"):
        page.get_by_label("Search").focus()
        page.keyboard.press("Control+A")
        page.keyboard.type(name)
        page.get_by_label(f"Choose {name}").focus()
        page.keyboard.press("Space")
    page.locator("#runs-compare").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/compare.html#*")
    page.wait_for_selector("#compare-settings tbody tr")
    differing = dict(
        zip(
            page.locator("#compare-settings tbody th").all_inner_texts(),
            page.locator("#compare-settings tbody tr").all(),
            strict=True,
        )
    )
    assert differing["attack.name"].locator("td").all_inner_texts() == ["badnet", "blend"]
    assert "model.width" not in differing
    seconds = page.locator("#compare-seconds-table tbody tr", has_text="repair").locator("td").first.inner_text()
    assert float(seconds) == pytest.approx(records[RUN].seconds["repair"], abs=0.051)
    best = page.locator("#compare-front tbody tr")
    assert best.count() >= 1


def sort_button(page, table, heading):
    """What is focused to sort by a column."""
    return page.locator(f"{table} thead th", has_text=heading).first.locator(".dt-column-order")


@pytest.mark.parametrize(
    ("page_name", "table", "heading"), [("runs.html", "#runs-table", "ACC %"), ("victims.html", "table.data-table", "ACC %")]
)
def test_a_table_is_sorted_by_keyboard(site, open_page, page_name, table, heading):
    """Tab reaches the heading; Enter and the space bar sort by it, up and down, and say so."""
    page = open_page(address(site, page_name))
    th = page.locator(f"{table} thead th", has_text=heading).first
    column = th.evaluate("each => each.cellIndex")

    def figures():
        texts = page.locator(f"{table} tbody tr").evaluate_all(
            "(rows, column) => rows.map((row) => row.cells[column].textContent)", column
        )
        return [float(text) for text in texts if text != "–"]

    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('th')?.textContent") == heading:
            break
    assert page.evaluate("document.activeElement.getAttribute('role')") == "button"
    assert figures() != sorted(figures()) and th.get_attribute("aria-sort") is None
    scrolled = page.evaluate("scrollY")
    for key, wanted, reverse in (("Space", "ascending", False), ("Enter", "descending", True)):
        page.keyboard.press(key)
        assert settled(page, lambda: th.get_attribute("aria-sort"), wanted) == wanted
        in_order = sorted(figures(), reverse=reverse)
        assert settled(page, figures, in_order) == in_order
    page.keyboard.press("Space")
    assert settled(page, lambda: th.get_attribute("aria-sort"), None) is None
    assert settled(page, lambda: figures() == sorted(figures()), False) is False
    assert page.evaluate("scrollY") == scrolled, "the space bar does not scroll the page as well"
    assert page.evaluate("document.activeElement.closest('th').textContent") == heading


def shown_as(page, form, button="keyboard"):
    page.get_by_role("button", name=f"Copy as {form}").focus()
    page.keyboard.press("Enter")
    return page.get_by_label("The table as text").input_value()


def test_a_pivot_of_any_keys_is_made_and_copied_by_keyboard(site, open_page, records, spread):
    """Defense by seed, of failed attacks, too: each cell of all three texts is the mean and the deviation of the records."""
    page = open_page(address(site, "pivot.html"))
    page.locator("#pivot-rows").focus()
    page.keyboard.type("defense.name")
    page.keyboard.press("Tab")
    page.keyboard.type("seed")
    page.keyboard.press("Tab")
    page.keyboard.type("TPR")
    page.locator("#pivot-failed").focus()
    page.keyboard.press("Space")
    assert page.locator("#pivot-columns").input_value() == "seed"
    wanted = {}
    for record in records.values():
        if "tpr" in (found := record.metrics[record.choice("defense")]):
            wanted.setdefault((record.choice("defense"), str(record.seed)), []).append(100 * found["tpr"])
    assert max(map(len, wanted.values())) > 5
    defenses, seeds = (sorted({key[part] for key in wanted}) for part in (0, 1))
    head, *rows = csv.reader(io.StringIO(shown_as(page, "CSV")))
    assert head == ["defense.name / seed", *(f"{seed} {part}" for seed in seeds for part in ("mean", "deviation", "n"))]
    for row in rows:
        for seed in seeds:
            mean, deviation, count = (row[head.index(f"{seed} {part}")] for part in ("mean", "deviation", "n"))
            values = wanted.get((row[0], seed), [])
            assert [float(each) for each in (mean, deviation) if each] == pytest.approx(
                spread(values) if values else [], abs=1e-3
            )
            assert int(count or 0) == len(values)
    assert [row[0] for row in rows] == defenses

    def words(values, sign, nothing):
        return sign.join(f"{each:.1f}" for each in spread(values)) if values else nothing

    lines = shown_as(page, "Markdown").splitlines()
    assert lines[:2] == [f"| defense.name / seed | {' | '.join(seeds)} |", "|---|" + "---|" * len(seeds)]
    texts = [words(wanted.get((defenses[0], seed)), " ± ", "–") for seed in seeds]
    assert lines[2] == f"| {defenses[0]} | {' | '.join(texts)} |"
    lines = shown_as(page, "LaTeX").splitlines()
    texts = [words(wanted.get(("static_clip", seed)), " \\pm ", "--") for seed in seeds]
    texts = [text if text == "--" else f"${text}$" for text in texts]
    assert f"static\\_clip & {' & '.join(texts)} \\\\" in lines
    assert (lines[0], lines[-1]) == (f"\\begin{{tabular}}{{l{'r' * len(seeds)}}}", "\\end{tabular}")


def test_hostile_names_stay_one_cell_in_every_text(site, open_page, hostile_text):
    page = open_page(address(site, "pivot.html"))
    markdown, latex, text = page.evaluate(
        "(name) => ['markdown', 'latex', 'csv'].map((form) => marginclip.exporting[form]({ head: ['name'], rows: [[name], ['=1+1']] }))",
        hostile_text,
    )
    (row,) = markdown.splitlines()[2:-1]
    assert re.fullmatch(r"\| (?:\\.|[^\\|<>`*_\[\]])*\|", row)
    assert latex.split("\n")[4].startswith("</script>") and latex.split("\n")[4].count("\\&") == 1
    assert len(latex.split("\n")) == 8, "a line for each row, and none of the name's own"
    assert list(csv.reader(io.StringIO(text, newline=""))) == [["name"], [hostile_text], ["'=1+1"]]


def test_an_auc_is_in_its_own_unit_with_three_digits(open_page, tmp_path, two_seeds):
    for record, auroc in zip(two_seeds, (0.9712, 0.9876), strict=True):
        record.metrics["mmdf"]["auroc"] = auroc
        record.write()
    page = open_page(write_dashboard(tmp_path / "runs", tmp_path / "site", pictures=False).as_uri().replace("index", "pivot"))
    page.locator("#pivot-metric").select_option("AUC")
    assert page.locator("#pivot-table td a").all_inner_texts() == ["0.979 ± 0.012"]
    assert "| MMDF | 0.979 ± 0.012 |" in shown_as(page, "Markdown")
    assert "MMDF & $0.979 \\pm 0.012$ \\\\" in shown_as(page, "LaTeX")


def test_a_pivot_has_the_papers_figure_a_colour_scale_and_leads_to_its_runs(site, open_page, records):
    page = open_page(address(site, "pivot.html"))
    row = page.locator("#pivot-table tbody tr").filter(has=page.get_by_role("rowheader", name="MMDF", exact=True))
    heads = page.locator("#pivot-table thead th").all_inner_texts()
    badnet = row.locator("td").nth(heads.index("badnet") - 1)
    assert badnet.locator("small.paper").inner_text() == "paper 0.09 ± 0.14"
    assert row.locator("td").nth(heads.index("one_pixel") - 1).locator("small.paper").count() == 0
    cells = page.locator("#pivot-table td.heat").evaluate_all(
        "cells => cells.map((each) => [Number(each.dataset.mean), Number(each.style.getPropertyValue('--heat')), "
        "getComputedStyle(each).backgroundColor])"
    )
    least, most = min(cells), max(cells)
    assert (least[1], most[1]) == (0, 1) and least[2] != most[2]
    assert sorted(heat for _, heat, _ in cells) == [heat for _, heat, _ in sorted(cells)]
    badnet.locator("a").click()
    page.wait_for_url("**/runs.html#*")
    page.wait_for_selector("#runs-table tbody tr")
    wanted = {name for name, each in records.items() if (each.choice("attack"), each.choice("defense")) == ("badnet", "mmdf")}
    assert settled(page, lambda: set(names_in(page)), wanted) == wanted and len(wanted) == 2


def hovered(page, canvas):
    """The tooltip of the point that is in the middle of the first line of a chart, and the content of that point."""
    place = f"Chart.getChart(document.querySelector('{canvas}'))"
    raw, x, y = page.evaluate(
        f"(() => {{ const points = {place}.getDatasetMeta(0).data; const at = points[points.length >> 1]; "
        "return [at.$context.raw, at.x, at.y]; })()"
    )
    page.locator(canvas).scroll_into_view_if_needed()
    box = page.locator(canvas).bounding_box()
    page.mouse.move(box["x"] + x, box["y"] + y)
    page.wait_for_function(f"{place}.tooltip.opacity > 0")
    return page.evaluate(f"{place}.tooltip.body.map((each) => each.lines).flat()"), raw


def test_roc_curves_tell_their_threshold_and_the_front_is_that_of_a_search(site, open_page, records, runs_dir):
    page = open_page(address(site, PAGES[3]), width=1600)
    lines, raw = hovered(page, "#compare-roc")
    scores = {
        kind: values.astype(float)
        for kind in ("clean", "triggered")
        for values in [load_file(runs_dir / RUN / "arrays.safetensors")[f"scores/mmdf_{kind}"]]
    }
    rates = {kind: 100 * np.mean(values >= raw["threshold"]) for kind, values in scores.items()}
    threshold = f"{raw['threshold']:.4g}"
    said = f"threshold {threshold}, FPR {rates['clean']:.2f} %, TPR {rates['triggered']:.1f} %"
    assert any(said in line for line in lines), (said, lines)
    assert page.evaluate("Chart.getChart(document.querySelector('#compare-roc')).data.datasets.length") == 2
    page.get_by_text("The curves as a table").click()
    rows = [row.split("\t") for row in page.locator("#compare-roc-table tbody tr").all_inner_texts()]
    assert {row[0] for row in rows} == {"1", "2"}
    for _, threshold, false, _ in (row for row in rows if row[0] == "1"):
        assert float(false) == pytest.approx(100 * np.mean(scores["clean"] >= float(threshold)), abs=0.3)

    page.get_by_text("The Pareto front as a table").click()
    points = {
        name: (own["acc"], own["asr"])
        for name, record in records.items()
        if record.status == "done"
        and record.choice("attack") == "badnet"
        and "asr" in (own := record.metrics[record.choice("defense")])
    }
    assert "badnet" in page.locator("#compare-group").input_value() and len(points) > 5
    wanted = {
        name
        for name, (acc, asr) in points.items()
        if not any((a >= acc and s <= asr and (a, s) != (acc, asr)) for a, s in points.values())
    }
    assert set(page.locator("#compare-front tbody th").all_inner_texts()) == wanted
    drawn = page.evaluate(
        "Chart.getChart(document.querySelector('#compare-scatter')).data.datasets.filter(({ label }) => label !== 'Pareto front')"
        ".flatMap((each) => each.data.map(({ x, y }) => [x, y]))"
    )
    assert sorted(drawn) == pytest.approx(np.array(sorted((100 * acc, 100 * asr) for acc, asr in points.values())), abs=2e-3)
    page.locator("#compare-front a").first.click()
    page.wait_for_selector("#figures")


def test_a_failed_run_and_the_victims_are_reached_from_the_overview(site, open_page, records):
    page = open_page(address(site, "index.html"))
    page.locator("#stopped ~ ul a").first.click()
    page.wait_for_selector("#repeat")
    assert "no memory" in page.locator("main").inner_text()
    page.get_by_role("navigation").get_by_role("link", name="Victims").click()
    page.wait_for_selector("table.data-table")
    row = page.locator("tbody tr", has_text="cifar10-resnet18-badnet-seed1")
    wanted = sorted(
        record.choice("defense") for name, record in records.items() if name.endswith("-seed1") and "-badnet-" in name
    )
    assert sorted(link.inner_text().split(",")[0].strip() for link in row.locator("a").all()) == wanted
