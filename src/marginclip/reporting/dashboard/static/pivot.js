// Any setting against any other: mean, deviation and number of runs of a figure in every cell.
"use strict";
marginclip.pages.pivot = (main, parameters) => {
  const { element, address, remember } = marginclip;
  const table = marginclip.table();
  const find = (id) => main.querySelector(`#pivot-${id}`);
  const SEEDS_OF_DATA = ["subset_seed", "split_seed"];
  const METHOD = "method";
  const where = marginclip.conditionsIn(parameters);
  let exported = { head: [], rows: [] };

  function fill(select, options, wanted, other) {
    select.replaceChildren(...options.map((name) => element("option", { value: name }, name)));
    select.value = options.includes(wanted) ? wanted : other;
  }
  const keys = [METHOD, ...table.varying, ...Object.keys(table.settings).filter((key) => !table.settings[key].index)];
  const usual = ["attack.name", "dataset.name", "defense.name"].find((key) => table.varying.includes(key)) ?? "status";
  fill(find("rows"), keys, parameters.get("rows"), METHOD);
  fill(find("columns"), keys, parameters.get("columns"), usual);
  fill(find("metric"), [...table.metricNames, "seconds"], parameters.get("metric"), table.metricNames.includes("ASR") ? "ASR" : table.metricNames[0]);
  if (parameters.get("of") === "main") find("of").value = "main";
  find("failed").checked = parameters.get("failed") === "yes";

  const keyed = (key, row) => (key === METHOD ? table.method(row) : table.setting(key, table.rows.run[row]));

  // The rows of each cell. The model as given counts once for each victim, however many runs measured it.
  function cells(rowKey, columnKey, metric, onlyMain, withFailed) {
    const found = new Map();
    const seen = new Set();
    table.rows.run.forEach((run, row) => {
      const status = table.setting("status", run);
      if (!(status === "done" || (withFailed && status === "attack_failed")) || !table.fits(run, where)) return;
      if (onlyMain && !table.rows.main[row]) return;
      const value = table.figure(metric, row);
      if (value === null) return;
      const place = JSON.stringify([keyed(rowKey, row), keyed(columnKey, row)]);
      if (table.rows.given[row]) {
        const same = JSON.stringify([place, table.runs.victim[run], value]);
        if (seen.has(same)) return;
        seen.add(same);
      }
      if (!found.has(place)) found.set(place, []);
      found.get(place).push({ row, run, value });
    });
    return found;
  }

  function statistics(entries) {
    const count = entries.length;
    const mean = entries.reduce((sum, each) => sum + each.value, 0) / count;
    const deviation = count < 2 ? null : Math.sqrt(entries.reduce((sum, each) => sum + (each.value - mean) ** 2, 0) / (count - 1));
    return { mean, deviation, count };
  }

  const identity = table.varying.filter((key) => table.identity.includes(key));

  // Settings other than the seed in which the runs of a cell differ.
  function mixed(entries, rowKey, columnKey) {
    const seed = (key) => key.endsWith("seed") && !SEEDS_OF_DATA.some((name) => key.endsWith(name));
    const given = entries.every(({ row }) => table.rows.given[row]); // the model as given knows nothing of a defense
    const told = identity.filter((key) => key !== rowKey && key !== columnKey && !seed(key) && !(given && (key.startsWith("defense.") || key === "clean_per_class")));
    const value = (key, run) => table.setting(key, run).replace("(absent)", "null"); // an option that a version did not have yet
    return told.filter((key) => new Set(entries.map(({ run }) => value(key, run))).size > 1);
  }

  function paper(entries, metric) {
    const found = new Set(entries.map(({ row }) => table.rows.published[row]));
    const one = found.size === 1 ? [...found][0] : null;
    return one === null ? null : { source: table.published[one].source, figures: table.published[one].metrics[metric] };
  }

  const headed = (name, scope) => element("th", { scope, title: name.length > 60 ? name : null }, marginclip.charts.short(name, 60));
  const digits = (metric) => (metric === "AUC" || metric === "NLL" ? 3 : 1);

  function cell(entries, rowKey, columnKey, metric, range) {
    if (!entries) return [element("td", { class: "empty" }, "–"), null, []];
    const spread = statistics(entries);
    const differing = mixed(entries, rowKey, columnKey);
    const conditions = [...where];
    let method = null;
    for (const key of [rowKey, columnKey]) {
      if (key === METHOD) method = table.method(entries[0].row);
      else conditions.push([key, table.setting(key, entries[0].run)]);
    }
    const link = address("runs", { where: conditions.map((pair) => JSON.stringify(pair)), ...(method === null ? {} : { method }) });
    const text = spread.mean.toFixed(digits(metric)) + (spread.deviation === null ? "" : ` ± ${spread.deviation.toFixed(digits(metric))}`);
    const theirs = paper(entries, metric);
    const made = element("td", { class: "heat", "data-mean": spread.mean, "data-count": spread.count },
      element("a", { href: link }, text), differing.length ? element("sup", { title: `differ in ${differing.join(", ")}` }, "†") : null,
      element("small", {}, ` n=${spread.count}`),
      theirs && theirs.figures ? element("small", { class: "paper", title: theirs.source }, `paper ${theirs.figures.join(" ± ")}`) : null);
    const width = range[1] - range[0];
    made.style.setProperty("--heat", width > 0 ? (spread.mean - range[0]) / width : 0);
    return [made, spread, differing, theirs && theirs.figures ? theirs.source : null];
  }

  function update() {
    const [rowKey, columnKey, metric] = [find("rows").value, find("columns").value, find("metric").value];
    const hasMethod = rowKey === METHOD || columnKey === METHOD;
    const onlyMain = !hasMethod || find("of").value === "main";
    const found = cells(rowKey, columnKey, metric, onlyMain, find("failed").checked);
    const places = [...found.keys()].map((text) => JSON.parse(text));
    const names = [0, 1].map((part) => [...new Set(places.map((place) => place[part]))].sort(table.natural));
    const means = [...found.values()].map((entries) => statistics(entries).mean);
    const range = [Math.min(...means), Math.max(...means)];
    const sources = new Set();
    const notes = [];
    const unit = metric === "seconds" ? "seconds" : metric === "AUC" ? "" : metric === "NLL" ? "nats" : "%";
    exported = { head: [`${rowKey} / ${columnKey}`, ...names[1]], rows: [] };
    const body = names[0].map((rowName) => {
      const line = [rowName];
      const made = names[1].map((columnName) => {
        const [shown, spread, differing, source] = cell(found.get(JSON.stringify([rowName, columnName])), rowKey, columnKey, metric, range);
        line.push(spread && { ...spread, digits: digits(metric) });
        if (source) sources.add(source);
        if (differing.length) notes.push(`${marginclip.charts.short(rowName)}, ${marginclip.charts.short(columnName)}: the runs differ in ${differing.slice(0, 6).join(", ")}${differing.length > 6 ? ` and ${differing.length - 6} more` : ""}`);
        return shown;
      });
      exported.rows.push(line);
      return element("tr", {}, headed(rowName, "row"), ...made);
    });
    find("table").replaceChildren(
      element("caption", {}, `${metric}${unit ? ` (${unit})` : ""}: mean ± sample deviation, n runs`),
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, `${rowKey} \\ ${columnKey}`), ...names[1].map((name) => headed(name, "col")))),
      element("tbody", {}, ...body));
    find("scale").replaceChildren(...(means.length > 1 ? [`${range[0].toFixed(digits(metric))}`, element("span"), `${range[1].toFixed(digits(metric))} ${unit}`] : []));
    find("note").textContent = means.length === 0 ? "No finished run has this figure under these conditions."
      : (onlyMain && !hasMethod ? "Each run's own method counts: neither rows nor columns tell methods apart. " : "The model as given counts once for each victim. ")
      + (table.lessIsBetter[metric] ? "Less is better." : metric === "seconds" ? "" : "More is better.")
      + (sources.size ? ` "paper": ${[...sources].join("; ")}; widths, training and clean sets can differ.` : "");
    find("mixed").closest("details").hidden = notes.length === 0;
    find("count").textContent = notes.length;
    find("mixed").replaceChildren(...notes.map((note) => element("li", {}, note)));
    remember("pivot", { rows: rowKey, columns: columnKey, metric, of: find("of").value, ...(find("failed").checked ? { failed: "yes" } : {}), where: where.map((pair) => JSON.stringify(pair)) });
  }

  for (const id of ["rows", "columns", "metric", "of", "failed"]) find(id).addEventListener("change", update);
  marginclip.conditions(find("where"), table, where, update);
  marginclip.exporting.offer(find("export"), () => exported);
  update();
};
