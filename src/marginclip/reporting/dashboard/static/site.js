// What all pages share: addresses, the pages of a single file, tables that sort and filter, buttons that copy.
"use strict";
window.marginclip = (() => {
  const html = document.documentElement;
  const single = html.dataset.single === "yes";
  const pages = {};
  const left = []; // what is to be done when a page of a single file is left

  // -- addresses: page.html#?key=value in a folder, #page?key=value in a single file

  function parameters() {
    const at = location.hash.indexOf("?");
    return new URLSearchParams(at < 0 ? "" : location.hash.slice(at + 1));
  }

  function address(page, given = {}) {
    const search = new URLSearchParams();
    for (const [key, value] of Object.entries(given)) {
      for (const each of Array.isArray(value) ? value : [value]) search.append(key, each);
    }
    const query = search.size ? `?${search}` : "";
    return single ? `#${page}${query}` : `${html.dataset.root}${page}.html${query ? `#${query}` : ""}`;
  }

  function remember(page, given) {
    const next = address(page, given);
    history.replaceState(null, "", next.includes("#") ? next.slice(next.indexOf("#")) : "#?");
  }

  // -- elements

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function enhance(table, options = {}) {
    for (const cell of table.querySelectorAll("tbody td.n:not([data-order]), table.numbers tbody td")) {
      const number = parseFloat(cell.textContent);
      cell.dataset.order = Number.isNaN(number) ? "" : number;
    }
    const count = table.tBodies[0].rows.length;
    const made = new DataTable(table, {
      order: [],
      autoWidth: false,
      paging: count > 50,
      pageLength: 50,
      searching: count > 12,
      info: count > 12,
      layout: { topStart: null, topEnd: null, top: count > 12 ? "search" : null, bottomStart: "info", bottomEnd: count > 50 ? "paging" : null },
      language: { search: "Search", info: "_START_ to _END_ of _TOTAL_", infoFiltered: "(of _MAX_)", infoEmpty: "none", emptyTable: "none", zeroRecords: "none" },
      ...options,
    });
    // DataTables sorts by Enter alone; a button answers to the space bar as well.
    table.tHead.addEventListener("keydown", (event) => {
      if (event.key !== " " || !event.target.matches(".dt-column-order")) return;
      event.preventDefault();
      event.target.click();
    });
    left.push(() => made.destroy());
    return made;
  }

  // Puts text where a paste finds it; where the browser does not allow it, selects the element that shows the text.
  async function copy(text, shown, button) {
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      if (shown.select) shown.select();
      else getSelection().selectAllChildren(shown);
      button.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => (button.textContent = before), 2500);
  }

  // -- pages

  function start(main) {
    for (const table of main.querySelectorAll("table.data-table")) enhance(table);
    for (const button of main.querySelectorAll("button.copy")) {
      const shown = button.parentElement.querySelector("pre");
      button.addEventListener("click", () => copy(shown.textContent, shown, button));
    }
    for (const form of main.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
    const begin = pages[main.dataset.page];
    if (begin) begin(main, parameters());
  }

  function show(name, main, moved) {
    const template = [...document.querySelectorAll("template")].find((each) => each.dataset.name === name);
    while (left.length) left.pop()();
    main.replaceChildren(template.content.cloneNode(true));
    main.dataset.page = name.split("/")[0];
    document.title = `${template.dataset.title} · marginclip`;
    for (const link of document.querySelectorAll("header a[data-to]")) {
      if (link.dataset.to === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    start(main);
    if (moved) {
      main.focus({ preventScroll: true });
      scrollTo(0, 0);
    }
  }

  function route(main, moved) {
    const name = decodeURIComponent(location.hash.slice(1).split("?")[0]) || "index";
    const known = [...document.querySelectorAll("template")].some((each) => each.dataset.name === name);
    if (known) return show(name, main, moved);
    if (!main.dataset.page) show("index", main, false);
    const place = document.getElementById(name);
    if (place) {
      place.scrollIntoView();
      place.focus();
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    const main = document.getElementById("main");
    if (single) {
      addEventListener("hashchange", () => route(main, true));
      route(main, false);
    } else {
      addEventListener("hashchange", () => location.hash.startsWith("#?") && location.reload());
      start(main);
    }
    html.dataset.ready = "yes";
  });

  return { pages, left, address, remember, element, enhance, copy };
})();
