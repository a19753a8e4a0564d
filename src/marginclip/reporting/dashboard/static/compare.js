// Some runs beside each other, and all finished ones as points.
"use strict";
marginclip.pages.compare = (main, parameters) => {
  const { element, address, remember, charts } = marginclip;
  const table = marginclip.table();
  const find = (id) => main.querySelector(`#compare-${id}`);
  const chosen = parameters.getAll("run").map((slug) => table.runs.slug.indexOf(slug)).filter((run) => run >= 0);
  const MOST = 24;
  let drawn = [];

  const name = (run) => table.runs.name[run];
  const linked = (run, most) => element("a", { href: address(`run/${table.runs.slug[run]}`) }, charts.short(name(run), most));
  const few = () => chosen.slice(0, MOST);

  function grid(head, rows, numeric) {
    return element("table", {}, element("thead", {}, element("tr", {}, ...head.map((text, place) => element("th", { scope: "col", class: numeric && place ? "n" : null }, text)))),
      element("tbody", {}, ...rows.map(([first, ...cells]) => element("tr", {}, element("th", { scope: "row" }, first), ...cells.map((text) => element("td", { class: numeric ? "n" : null }, text))))));
  }

  function showChosen() {
    find("chosen").replaceChildren(...chosen.map((run, place) => element("li", { class: "chip" },
      linked(run, 70), " ",
      element("button", { type: "button", "aria-label": `Remove ${charts.short(name(run), 70)}`, onclick: () => (chosen.splice(place, 1), update()) }, "×"))));
    find("status").textContent = chosen.length ? `${chosen.length} runs are chosen${chosen.length > MOST ? `, of which the first ${MOST} are drawn` : ""}.` : "No run is chosen. Add some here, or choose them on the page Runs.";
  }

  function showSettings() {
    const runs = few();
    const differing = table.varying.filter((key) => new Set(runs.map((run) => table.setting(key, run))).size > 1);
    const numbers = runs.map((_, place) => String(place + 1));
    const lines = (keys) => grid(["setting", ...numbers], keys.map((key) => [key, ...runs.map((run) => charts.short(table.setting(key, run).replace("(absent)", "–"), 80))]), false);
    const ofAll = differing.filter((key) => runs.every((run) => table.setting(key, run) !== "(absent)"));
    const ofSome = differing.filter((key) => !ofAll.includes(key));
    find("settings").replaceChildren(runs.length < 2 ? element("p", {}, "Choose two runs or more.") : ofAll.length ? lines(ofAll) : element("p", {}, "No setting that all of them have differs."),
      ofSome.length ? element("details", {}, element("summary", {}, `${ofSome.length} settings that only some of them have`), lines(ofSome)) : "");
  }

  function showCurves() {
    const known = few().map((run, place) => [run, place]).filter(([run]) => table.curves[run]);
    find("roc").closest("section").classList.toggle("nothing", known.length === 0);
    if (!known.length) return;
    drawn.push(charts.roc(find("roc"), known.map(([run, place]) => charts.rocLine(table.curves[run], `${place + 1} ${name(run)}`, place))));
    const points = known.flatMap(([run, place]) => table.curves[run].map(([threshold, x, y]) => [String(place + 1), threshold.toPrecision(4), (100 * x).toFixed(2), (100 * y).toFixed(1)]));
    find("roc-table").replaceChildren(grid(["run", "threshold", "FPR %", "TPR %"], points, true));
  }

  function showSeconds() {
    const runs = few();
    const phases = [...new Set(runs.flatMap((run) => Object.keys(table.seconds[run])))];
    find("seconds").closest("section").classList.toggle("nothing", phases.length === 0);
    if (!phases.length) return find("seconds-table").replaceChildren();
    drawn.push(charts.draw(find("seconds"), {
      type: "bar",
      data: { labels: runs.map((run, place) => `${place + 1} ${charts.short(name(run), 24)}`), datasets: phases.map((phase, number) => ({ label: phase, data: runs.map((run) => table.seconds[run][phase] ?? 0), backgroundColor: charts.colour(number) })) },
      options: { indexAxis: "y", scales: { x: charts.axis("seconds", { stacked: true }), y: { ...charts.axis("", { stacked: true }), title: { display: false } } } },
    }));
    find("seconds-table").replaceChildren(grid(["phase", ...runs.map((_, place) => String(place + 1))], phases.map((phase) => [phase, ...runs.map((run) => (table.seconds[run][phase] ?? 0).toFixed(1))]), true));
  }

  // -- ACC against ASR

  const GROUP = ["dataset.name", "model.name", "attack.name", "x2x.name"];
  const groupOf = (run) => GROUP.map((key) => table.setting(key, run)).join(", ");
  const points = table.runs.slug.map((_, run) => ({ run, row: table.ownRow[run] }))
    .filter(({ run, row }) => row !== null && table.setting("status", run) === "done")
    .map(({ run, row }) => ({ run, x: table.rows.figures.ACC ? table.figure("ACC", row) : null, y: table.rows.figures.ASR ? table.figure("ASR", row) : null, method: table.method(row) }))
    .filter(({ x, y }) => x !== null && y !== null);
  const groups = [...new Set(points.map(({ run }) => groupOf(run)))].sort(table.natural);
  find("group").replaceChildren(...groups.map((text) => element("option", { value: text }, charts.short(text, 70))));
  const wantedGroup = parameters.get("group") ?? (chosen.length ? groupOf(chosen[0]) : null);
  if (groups.includes(wantedGroup)) find("group").value = wantedGroup;

  // The points that no other beats: by falling ACC, each of less ASR than all before.
  function front(candidates) {
    let least = Infinity;
    return [...candidates].sort((one, other) => other.x - one.x || one.y - other.y).filter((point) => point.y < least && ((least = point.y), true));
  }

  function showScatter() {
    const here = points.filter(({ run }) => groupOf(run) === find("group").value);
    const best = front(here);
    const methods = [...new Set(here.map(({ method }) => method))].sort(table.natural);
    const SHAPES = ["circle", "triangle", "rect", "rectRot", "star", "crossRot"];
    const said = ({ raw }) => [charts.short(name(raw.run), 80), `${raw.method}: ACC ${raw.x.toFixed(1)} %, ASR ${raw.y.toFixed(1)} %`];
    drawn.push(charts.draw(find("scatter"), {
      type: "scatter",
      data: {
        datasets: [
          ...methods.map((method, number) => ({
            label: method, data: here.filter((point) => point.method === method), pointRadius: 6, pointHoverRadius: 8, pointStyle: SHAPES[number % SHAPES.length],
            borderColor: charts.colour(number), borderWidth: 2, backgroundColor: ({ raw }) => (raw && chosen.includes(raw.run) ? charts.colour(number)() : "transparent"),
          })),
          { label: "Pareto front", data: best, showLine: true, pointRadius: 0, pointHitRadius: 0, borderColor: charts.named("--soft"), borderWidth: 1.5, borderDash: [5, 4], stepped: "after", pointStyle: "line" },
        ],
      },
      options: {
        scales: { x: charts.axis("ACC (%)"), y: charts.axis("ASR (%)", { min: 0 }) },
        plugins: { tooltip: { callbacks: { label: said } } },
        onClick: (_, found) => found.length && (location.href = address(`run/${table.runs.slug[found[0].element.$context.raw.run]}`)),
      },
    }));
    find("front").replaceChildren(grid(["run", "method", "ACC %", "ASR %"], best.map((point) => [linked(point.run, 80), point.method, point.x.toFixed(1), point.y.toFixed(1)]), true));
  }

  function update() {
    for (const chart of drawn) chart.destroy();
    drawn = [];
    showChosen();
    showSettings();
    showCurves();
    showSeconds();
    if (groups.length) showScatter();
    else find("scatter").closest("section").classList.add("nothing");
    remember("compare", { run: chosen.map((run) => table.runs.slug[run]), ...(groups.length ? { group: find("group").value } : {}) });
  }

  find("names").replaceChildren(...table.runs.name.map((text) => element("option", { value: charts.short(text, 200) })));
  find("add").addEventListener("submit", () => {
    const run = table.runs.name.findIndex((text) => charts.short(text, 200) === find("run").value);
    if (run < 0) return (find("status").textContent = "There is no such run.");
    if (!chosen.includes(run)) chosen.push(run);
    find("run").value = "";
    update();
  });
  find("clear").addEventListener("click", () => ((chosen.length = 0), update()));
  find("group").addEventListener("change", update);
  update();
};
