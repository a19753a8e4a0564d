"""A folder of made-up runs, among them one whose every text is hostile, its dashboard in both forms, and Chromium where there is one."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from marginclip.record import RunRecord, read_record
from marginclip.reporting.dashboard import write_dashboard

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "dashboard.py"
EVIL = "</script><script>window.broken=1</script>\"'`<img src=x onerror=window.broken=2>\n\t{{ 7 * 7 }} &amp; é\u2028|"
LONG = "x<b>" * 2500


@pytest.fixture(scope="session")
def synthetic():
    """The module that makes up runs."""
    spec = importlib.util.spec_from_file_location("benchmark_dashboard", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_hostile(folder):
    """A run whose names, settings, classes, errors and findings try to be HTML, script, or too long."""
    place = folder / "<img src=x onerror='window.broken=3'>"
    place.mkdir()
    names = [EVIL, LONG, "=1+1", "plain"]
    RunRecord(
        status="done",
        error=EVIL,
        config={
            "seed": 3,
            "dataset": {"name": EVIL},
            "attack": {"name": EVIL, EVIL: LONG},
            "defense": {"name": EVIL},
            "model": {"name": LONG},
            "__proto__": {"x": "1"},
        },
        identity={"attack": {"name": EVIL}},
        seed=3,
        versions={"torch": EVIL, EVIL: "1"},
        rows={"none": {"label": "no defense"}, EVIL: {"label": EVIL}},
        repaired_row=EVIL,
        metrics={"none": {"acc": 0.9, "asr": 1.0}, EVIL: {"acc": 0.8, "asr": 0.1}},
        detector={"threshold": 2.0},
        per_class={"none": [0.9] * 4, EVIL: [0.8] * 4},
        classes=names,
        evaluated_on="held_out",
        history=[{"agreement": 0.5}],
        findings={EVIL: [EVIL]},
    ).at(place).write()
    scores = {f"scores/{EVIL}_{kind}": torch.arange(5.0) + shift for kind, shift in (("clean", 0), ("triggered", 2))}
    images = torch.rand(4, 3, 6, 6)
    found = {"examples/clean": images, "examples/triggered": 1 - images, "examples/labels": torch.arange(4)}
    extreme = {"images": (255 * images).byte(), "statistic": torch.arange(4.0), "labels": torch.arange(4)}
    found |= {f"extremes/{EVIL}/missed/{key}": values for key, values in extreme.items()}
    stages = {f"activations/<i>{EVIL[:30]}/{key}": torch.rand(3) for key in ("clean_max", "upper")}
    save_file(scores | found | stages | {"examples/targets": torch.zeros(4).long()}, place / "arrays.safetensors")


@pytest.fixture
def two_seeds(tmp_path, synthetic):
    """The records of two made-up runs of one setting, which differ in their seed alone, in a folder of the test's own."""
    (first,) = synthetic.write_runs(tmp_path / "runs", 1)
    second = shutil.copytree(first, first.with_name(first.name.replace("seed0", "seed1")))
    records = [read_record(place) for place in (first, second)]
    records[1].seed = records[1].config["seed"] = records[1].identity["seed"] = 1
    records[1].write()
    return records


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory, synthetic):
    """Sixty-five made-up runs, a hostile, a failed and an unreadable one, and a sweep with one missing and one failed cell."""
    folder = tmp_path_factory.mktemp("runs")
    places = synthetic.write_runs(folder, 65)
    write_hostile(folder)
    failed = RunRecord(status="failed", error="no memory", config={"attack": {"name": "wanet"}}, seed=0)
    failed.at(folder / "failed").write()
    (folder / "unreadable").mkdir()
    (folder / "unreadable" / "run.json").write_text("{")
    sweep = folder / "sweeps" / "today"
    outcomes = [{"error": None, "record": str(places[0] / "run.json")}, None, {"error": EVIL, "record": None}]
    for number, outcome in enumerate(outcomes):
        (sweep / str(number)).mkdir(parents=True)
        if outcome is not None:
            (sweep / str(number) / "outcome.json").write_text(json.dumps(outcome | {"overrides": f"seed={number}"}))
    (sweep / "sweep.json").write_text(json.dumps({"asked": [f"seed={number}" for number in range(4)]}))
    return folder


@pytest.fixture(scope="session")
def hostile_text():
    """What the hostile run is full of."""
    return EVIL


@pytest.fixture(scope="session")
def long_text():
    """Ten thousand letters that the hostile run has as names."""
    return LONG


@pytest.fixture(scope="session")
def records(runs_dir):
    """The records of the made-up runs by the name of their folder."""
    return {place.name: read_record(place) for place in sorted(runs_dir.glob("cifar10-*"))}


@pytest.fixture(scope="session")
def site(tmp_path_factory, runs_dir):
    """The dashboard as a folder."""
    return write_dashboard(runs_dir, tmp_path_factory.mktemp("site") / "pages").parent


@pytest.fixture(scope="session")
def single(tmp_path_factory, runs_dir):
    """The dashboard as one file."""
    return write_dashboard(runs_dir, tmp_path_factory.mktemp("single") / "all.html")


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """Opens an address without network; at the end, nothing was asked of a network, no script failed, and no dialog opened."""
    contexts, complaints = [], []

    def open_page(address, *, width=1280, dark=False):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: complaints.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(address)
        page.wait_for_selector("html[data-ready=yes]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def spread():
    """Mean and, of two values or more, sample deviation."""

    def spread(values):
        return [np.mean(values)] if len(values) < 2 else [np.mean(values), np.std(values, ddof=1)]

    return spread
