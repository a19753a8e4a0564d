"""Real Chromium opens every page from disk, offline: it sorts, filters, pivots and moves thresholds, and the figures are the records'."""

import csv
import io
from urllib.parse import quote

import numpy as np
import pytest
from safetensors.numpy import load_file

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


@pytest.mark.parametrize(("width", "dark"), [(320, True), (1600, False)])
def test_every_page_fits_is_accessible_and_asks_for_nothing(site, open_page, width, dark):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    hostile = next((site / "run").glob("img-src*.html")).name
    serious = []
    for page_name in (*PAGES, f"run/{RUN}.html", f"run/{hostile}"):
        page = open_page(address(site, page_name), width=width, dark=dark)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, page_name
        assert page.evaluate("window.broken") is None
        found = axe.run(page, options={"resultTypes": ["violations"], "preload": False}).response["violations"]
        worst = [each for each in found if each["impact"] in ("serious", "critical")]
        serious += [(page_name, each["id"], node["html"][:200]) for each in worst for node in each["nodes"]]
    assert serious == []


def names_in(page):
    return page.locator("#runs-table tbody td.run").all_inner_texts()


def test_runs_sort_filter_and_show_other_columns(site, open_page, records):
    page = open_page(address(site, "runs.html"))
    page.get_by_label("Setting", exact=True).select_option("attack.name")
    page.get_by_label("Value", exact=True).select_option("badnet")
    wanted = {name: record for name, record in records.items() if record.choice("attack") == "badnet"}
    assert set(names_in(page)) == set(wanted)
    heading = page.locator("#runs-table th", has_text="ACC %").first
    heading.click()
    by_accuracy = sorted(wanted, key=lambda name: round(wanted[name].metrics[wanted[name].choice("defense")]["acc"], 5))
    assert names_in(page) == by_accuracy
    page.get_by_label("Search").fill("nad")
    assert set(names_in(page)) == {name for name in wanted if "-nad-" in name}
    page.get_by_text("Choose columns").click()
    page.get_by_label("Find a setting").fill("optimizer.lr")
    page.get_by_label("training.optimizer.lr").check()
    assert page.locator("#runs-table th", has_text="training.optimizer.lr").count() == 1
    page.get_by_role("button", name="Copy as CSV").click()
    rows = list(csv.reader(io.StringIO(page.get_by_label("The table as text").input_value())))
    assert {row[0] for row in rows[1:]} == set(wanted) and rows[0][-1] == "training.optimizer.lr"


def test_a_pivot_holds_means_over_seeds_and_leads_to_its_runs(site, open_page, records, spread):
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
    for form, wanted in {
        "Markdown": "| method / attack.name |",
        "LaTeX": "\\begin{tabular}",
        "CSV": "badnet mean,badnet deviation,badnet n",
    }.items():
        page.get_by_role("button", name=f"Copy as {form}").click()
        assert wanted in page.get_by_label("The table as text").input_value()
    page.locator("#pivot-table a").first.click()
    page.wait_for_url("**/runs.html#*")
    page.wait_for_selector("#runs-table tbody tr")
    assert len(names_in(page)) >= 1


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
        assert page.locator("h1").inner_text() == name
    badnet = quote('["attack.name","badnet"]')
    page.goto(f"{single.as_uri()}#pivot?metric=ACC&where={badnet}")
    page.wait_for_selector("#pivot-table tbody tr")
    assert page.locator("#pivot-table thead th").all_inner_texts()[1:] == ["badnet"]
    page.goto(f"{single.as_uri()}#runs")
    page.get_by_label("Search").fill("onerror")
    page.locator("#runs-table td.run a").click()
    page.wait_for_selector("#figures")
    assert page.locator("h1").evaluate("each => each.textContent").count(hostile_text) == 3
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
