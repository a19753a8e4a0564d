// A table as Markdown, LaTeX or CSV. A cell is a text, a number, null, or {mean, deviation, count, digits}; CSV has all digits.
"use strict";
marginclip.exporting = (() => {
  const spread = ({ mean, deviation, digits }, plusMinus) => (deviation === null ? mean.toFixed(digits) : `${mean.toFixed(digits)}${plusMinus}${deviation.toFixed(digits)}`);
  const isSpread = (cell) => cell !== null && typeof cell === "object";
  const text = (cell, plusMinus) => (cell === null ? "–" : isSpread(cell) ? spread(cell, plusMinus) : String(cell));

  const ofMarkdown = (value) => value.replaceAll("\\", "\\\\").replace(/[|*_`<>[\]]/g, "\\$&").replace(/\s+/g, " ");
  const latexSigns = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "–": "--", "λ": "$\\lambda$", "†": "$\\dagger$" };
  const ofLatex = (value) => value.replace(/[\\~^±–λ†]|[&%$#_{}]/g, (sign) => latexSigns[sign] ?? `\\${sign}`).replace(/\s+/g, " ");
  // A text that a spreadsheet would take for a formula gets an apostrophe in front.
  function ofCsv(cell) {
    if (cell === null) return "";
    if (typeof cell === "number") return String(cell);
    const safe = /^[=+\-@\t\r]/.test(cell) && !/^-?[\d.]+(e-?\d+)?$/i.test(cell) ? `'${cell}` : cell;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }

  function markdown({ head, rows }) {
    const line = (cells) => `| ${cells.map((cell) => ofMarkdown(text(cell, " ± "))).join(" | ")} |`;
    return [line(head), `|${head.map(() => "---").join("|")}|`, ...rows.map(line)].join("\n");
  }

  function latex({ head, rows }) {
    const line = (cells) => `${cells.map((cell) => (isSpread(cell) ? `$${spread(cell, " \\pm ")}$` : ofLatex(text(cell)))).join(" & ")} \\\\`;
    return [`\\begin{tabular}{l${"r".repeat(head.length - 1)}}`, "\\hline", line(head), "\\hline", ...rows.map(line), "\\hline", "\\end{tabular}"].join("\n");
  }

  function csv({ head, rows }) {
    const wide = head.map((_, column) => rows.some((row) => isSpread(row[column])));
    const top = head.flatMap((name, column) => (wide[column] ? [`${name} mean`, `${name} deviation`, `${name} n`] : [name]));
    const parts = (cell, column) => {
      if (!wide[column]) return [cell];
      return isSpread(cell) ? [cell.mean, cell.deviation, cell.count] : [null, null, null];
    };
    return [top, ...rows.map((row) => row.flatMap(parts))].map((cells) => cells.map(ofCsv).join(",")).join("\r\n");
  }

  // Buttons that show a table in each form, and copy it. `content` gives the table as it is when a button is pressed.
  function offer(place, content) {
    const { element, copy } = marginclip;
    const shown = element("textarea", { rows: 8, readonly: true, hidden: true, "aria-label": "The table as text", spellcheck: "false" });
    const buttons = Object.entries({ Markdown: markdown, LaTeX: latex, CSV: csv }).map(([name, write]) => {
      const button = element("button", { type: "button", "data-form": name }, `Copy as ${name}`);
      button.addEventListener("click", () => {
        shown.hidden = false;
        shown.value = write(content());
        copy(shown.value, shown, button);
      });
      return button;
    });
    place.replaceChildren(element("p", { class: "actions" }, ...buttons), shown);
  }

  return { offer, markdown, latex, csv };
})();
