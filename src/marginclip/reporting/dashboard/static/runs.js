// All runs in a table that sorts and filters, with the columns of one's choice.
"use strict";
marginclip.pages.runs = (main, parameters) => {
  const { element, address, remember, enhance } = marginclip;
  const table = marginclip.table();
  const find = (id) => main.querySelector(`#runs-${id}`);
  const OWN = "each run's own method";
  const FIRST = ["status", "attack.name", "defense.name", "seed"];
  const LATER = ["dataset.name", "model.name", "x2x.name"];
  const USUAL = [...FIRST, ...LATER];
  const where = marginclip.conditionsIn(parameters);
  const figures = [...table.metricNames, "seconds"];
  const chosenColumns = new Set(parameters.getAll("column").length ? parameters.getAll("column") : [...USUAL, ...["ACC", "ASR", "PACC", "TPR", "FPR"].filter((name) => figures.includes(name)), "ASR before", "seconds"]);
  const picked = new Set();
  let drawn = null;
  let exported = { head: [], rows: [] };

  const methods = [OWN, ...[...table.rows.method.values].sort(table.natural)];
  find("method").replaceChildren(...methods.map((name) => element("option", { value: name }, name)));
  if (methods.includes(parameters.get("method"))) find("method").value = parameters.get("method");

  const further = Object.keys(table.settings).filter((key) => !USUAL.includes(key));
  const columns = [...FIRST, ...figures, "ASR before", ...LATER, ...further];

  function rowOf(run, method) {
    if (method === OWN) return table.ownRow[run];
    const found = table.rows.run.findIndex((each, row) => each === run && table.method(row) === method);
    return found < 0 ? null : found;
  }

  function value(column, run, row) {
    if (column === "ASR before") return table.runs.before[run] === null ? null : 100 * table.runs.before[run];
    if (figures.includes(column)) return row === null ? null : table.figure(column, row);
    return table.setting(column, run);
  }

  const isNumeric = (column) => column === "seed" || column === "ASR before" || figures.includes(column);
  const headed = (column) => (column === "ASR before" || (figures.includes(column) && !["seconds", "AUC", "NLL"].includes(column)) ? `${column} %` : column);

  function shown(column, content) {
    const isNumber = typeof content === "number";
    const text = content === null ? "–" : isNumber ? content.toFixed(column === "AUC" || column === "NLL" ? 3 : 1) : marginclip.charts.short(content, 80);
    return element("td", { class: isNumber || isNumeric(column) ? "n" : null, "data-order": content === null ? "" : content }, column === "status" ? element("span", { class: `badge ${content}` }, text) : text);
  }

  function pick(run, on) {
    if (on) picked.add(run);
    else picked.delete(run);
    find("chosen").textContent = picked.size ? `${picked.size} chosen` : "Choose runs by their boxes.";
    find("compare").disabled = picked.size === 0;
  }

  function update() {
    if (drawn) drawn.destroy();
    const method = find("method").value;
    const listed = columns.filter((column) => chosenColumns.has(column));
    const rows = table.runs.slug.map((_, run) => [run, rowOf(run, method)]).filter(([run, row]) => table.fits(run, where) && (method === OWN || row !== null));
    exported = { head: ["run", ...listed], rows: rows.map(([run, row]) => [table.runs.name[run], ...listed.map((column) => rounded(value(column, run, row)))]) };
    const made = element("table", {},
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, element("span", { class: "sr" }, "chosen")), element("th", { scope: "col" }, "run"),
        ...listed.map((column) => element("th", { scope: "col", class: isNumeric(column) ? "n" : null }, headed(column))))),
      element("tbody", {}, ...rows.map(([run, row]) => element("tr", {},
        element("td", { "data-order": picked.has(run) ? 0 : 1 }, box(run)),
        element("td", { class: "wide run" }, element("a", { href: address(`run/${table.runs.slug[run]}`) }, marginclip.charts.short(table.runs.name[run], 90))),
        ...listed.map((column) => shown(column, value(column, run, row)))))));
    find("table").replaceChildren(made);
    const layout = { topStart: null, topEnd: null, top: "search", bottomStart: "info", bottomEnd: rows.length > 50 ? "paging" : null };
    drawn = enhance(made, { searching: true, info: true, layout, columnDefs: [{ targets: 0, orderable: false, searchable: false }] });
    marginclip.left.pop();
    remember("runs", { ...(method === OWN ? {} : { method }), where: where.map((pair) => JSON.stringify(pair)), column: listed });
  }
  marginclip.left.push(() => drawn && drawn.destroy());

  const rounded = (content) => (typeof content === "number" ? Number(content.toFixed(3)) : content);

  function box(run) {
    const made = element("input", { type: "checkbox", "aria-label": `Choose ${marginclip.charts.short(table.runs.name[run], 90)}` });
    made.checked = picked.has(run);
    made.addEventListener("change", () => pick(run, made.checked));
    return made;
  }

  function offerColumns() {
    const wanted = find("find").value.toLowerCase();
    const offered = columns.filter((column) => column.toLowerCase().includes(wanted));
    find("columns").replaceChildren(...offered.map((column) => {
      const ticked = element("input", { type: "checkbox" });
      ticked.checked = chosenColumns.has(column);
      ticked.addEventListener("change", () => {
        if (ticked.checked) chosenColumns.add(column);
        else chosenColumns.delete(column);
        update();
      });
      return element("label", { class: "check" }, ticked, ` ${column}`);
    }));
  }

  find("method").addEventListener("change", update);
  find("find").addEventListener("input", offerColumns);
  find("compare").addEventListener("click", () => (location.href = address("compare", { run: [...picked].map((run) => table.runs.slug[run]) })));
  marginclip.conditions(find("where"), table, where, update);
  marginclip.exporting.offer(find("export"), () => exported);
  find("columns").closest("details").addEventListener("toggle", offerColumns, { once: true });
  pick(-1, false);
  update();
};
