// The table of all runs: settings by run, figures by evaluated row; and the choice of runs by their settings.
"use strict";
marginclip.table = () => {
  const inline = document.getElementById("table");
  const content = JSON.parse(inline ? inline.textContent : window.marginclipTable);
  const { runs, settings, rows } = content;
  const setting = (key, run) => {
    const found = settings[key];
    if (!found) return "(absent)";
    return found.index ? found.values[found.index[run]] : found.values[0];
  };
  const method = (row) => rows.method.values[rows.method.index[row]];
  const natural = (one, other) => one.localeCompare(other, "en", { numeric: true });
  const varying = Object.keys(settings).filter((key) => settings[key].index);
  const valuesOf = (key) => [...settings[key].values].sort(natural);
  const ownRow = runs.slug.map(() => null);
  rows.run.forEach((run, row) => rows.main[row] && (ownRow[run] = row));
  const fits = (run, where) => where.every(([key, value]) => setting(key, run) === value);
  const share = Object.fromEntries(content.metrics.map(({ name, share: is }) => [name, is]));
  const lessIsBetter = Object.fromEntries(content.metrics.map(({ name, less }) => [name, less]));
  // A figure in the unit of tables: percent, but AUC in [0, 1] and NLL in nats.
  const figure = (name, row) => {
    const value = name === "seconds" ? rows.seconds[row] : rows.figures[name][row];
    return value === null ? null : share[name] ? 100 * value : value;
  };
  return { ...content, setting, method, natural, varying, valuesOf, ownRow, fits, figure, lessIsBetter, metricNames: Object.keys(rows.figures) };
};

// Fills `place` with the conditions of `where`, each of which can be removed, and with a way to add one. `changed` is called after each change.
marginclip.conditions = (place, table, where, changed) => {
  const { element } = marginclip;
  const legend = place.querySelector("legend");
  const again = (focus) => {
    marginclip.conditions(place, table, where, changed);
    if (focus) place.querySelector("select").focus();
    changed();
  };
  const chips = where.map(([key, value], position) =>
    element("span", { class: "chip" }, `${key} = ${marginclip.charts.short(value, 60)} `,
      element("button", { type: "button", "aria-label": `Remove the condition on ${key}`, onclick: () => (where.splice(position, 1), again(true)) }, "×")),
  );
  const key = element("select", { "aria-label": "Setting" }, element("option", { value: "" }, "setting…"), ...table.varying.map((name) => element("option", { value: name }, name)));
  const value = element("select", { "aria-label": "Value", disabled: true }, element("option", { value: "" }, "value…"));
  key.addEventListener("change", () => {
    value.disabled = !key.value;
    value.replaceChildren(element("option", { value: "" }, "value…"), ...(key.value ? table.valuesOf(key.value) : []).map((each) => element("option", { value: each }, marginclip.charts.short(each, 60))));
  });
  value.addEventListener("change", () => {
    if (value.selectedIndex < 1) return;
    where.push([key.value, value.value]);
    again(true);
  });
  place.replaceChildren(legend, ...chips, key, value);
};

marginclip.conditionsIn = (parameters) => {
  const pairs = parameters.getAll("where").map((text) => {
    try {
      return JSON.parse(text);
    } catch {
      return null;
    }
  });
  return pairs.filter((pair) => Array.isArray(pair) && pair.length === 2 && pair.every((part) => typeof part === "string"));
};
