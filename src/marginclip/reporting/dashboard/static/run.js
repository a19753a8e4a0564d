// One run: the threshold that moves, the bounds of each stage, the learning curves.
"use strict";
marginclip.pages.run = (main) => {
  const { charts, element } = marginclip;
  const data = JSON.parse(main.querySelector("script.data").textContent);

  // -- the detector at another threshold

  const OF = { true: "triggered", false: "clean", success: "triggered", restored: "triggered", correct: "clean" };
  const RECORDED = { true: "tpr", false: "fpr", success: "asr", restored: "pacc", correct: "acc" };

  function detector(place, found) {
    const slider = place.querySelector(".threshold");
    const typed = place.querySelector(".value");
    const line = {
      id: "threshold",
      afterDatasetsDraw: ({ ctx, chartArea: { top, bottom }, scales: { x } }) => {
        const at = x.getPixelForValue(found.thresholds[slider.value]);
        ctx.save();
        ctx.strokeStyle = charts.css("--ink");
        ctx.setLineDash([5, 4]);
        ctx.lineWidth = 2;
        ctx.beginPath();
        ctx.moveTo(at, top);
        ctx.lineTo(at, bottom);
        ctx.stroke();
        ctx.restore();
      },
    };
    const kinds = Object.keys(found.histogram);
    const canvas = place.querySelector("canvas.histogram");
    const first = found.thresholds[0];
    const last = found.thresholds[found.thresholds.length - 1];
    const chart = charts.draw(canvas, {
      type: "line",
      data: { datasets: kinds.map((kind, number) => charts.stepped(kind, found.edges, found.histogram[kind], found.images[kind], number)) },
      options: {
        parsing: false,
        events: [],
        scales: { x: charts.axis("margin lost to the bounds (logits)", { type: "linear", min: first, max: last }), y: charts.axis("share of images (%)", { beginAtZero: true }) },
      },
      plugins: [line],
    });

    function say(figure, number) {
      const total = found.images[OF[figure]];
      const counts = found[figure];
      if (counts) return `${((100 * counts[number]) / total).toFixed(2)} % (${counts[number]} of ${total})`;
      const recorded = number === found.at ? (data.metrics[found.row] ?? {})[RECORDED[figure]] : null;
      return recorded === null || recorded === undefined ? "not known" : `${(100 * recorded).toFixed(2)} %`;
    }

    function update() {
      const number = Number(slider.value);
      const threshold = found.thresholds[number];
      typed.value = Number(threshold.toPrecision(5));
      slider.setAttribute("aria-valuetext", `${threshold.toPrecision(4)} logits${number === found.at ? ", as in the run" : ""}`);
      for (const cell of place.querySelectorAll("[data-figure]")) cell.textContent = say(cell.dataset.figure, number);
      chart.draw();
    }

    function move(threshold) {
      const distances = found.thresholds.map((each) => Math.abs(each - threshold));
      slider.value = distances.indexOf(Math.min(...distances));
      update();
    }

    function drag(event) {
      if (event.buttons & 1) move(chart.scales.x.getValueForPixel(event.offsetX));
    }
    canvas.addEventListener("pointerdown", (event) => (canvas.setPointerCapture(event.pointerId), drag(event)));
    canvas.addEventListener("pointermove", drag);
    slider.addEventListener("input", update);
    typed.addEventListener("change", () => typed.value !== "" && move(Number(typed.value)));
    const own = place.querySelector(".own");
    if (own) own.addEventListener("click", () => ((slider.value = found.at), update()));
    const curve = place.querySelector("canvas.roc");
    if (curve) {
      const points = found.thresholds.map((threshold, number) => [threshold, found.false[number] / found.images.clean, found.true[number] / found.images.triggered]);
      curve.closest("details").addEventListener("toggle", () => charts.roc(curve, [charts.rocLine(points, found.label, 0)]), { once: true });
    }
    update();
  }
  for (const place of main.querySelectorAll(".detection")) detector(place, data.detections[place.dataset.number]);

  // -- bounds

  const stages = main.querySelector("canvas.stages");
  if (stages) {
    const table = stages.closest("section").querySelector("table");
    const place = { clean: 2, triggered: 3, bound: 4 };
    const column = (key) => [...table.tBodies[0].rows].map(({ cells }) => (cells[place[key]].textContent === "–" ? null : Number(cells[place[key]].textContent)));
    const labels = [...table.querySelectorAll("tbody th")].map((cell) => charts.short(cell.textContent, 22));
    const looks = { clean: ["circle", 0], triggered: ["triangle", 1], bound: ["rect", 2] };
    const series = Object.entries(looks).map(([key, [pointStyle, number]]) => ({
      label: key === "bound" ? "learned bound" : `largest activation, ${key} images`, data: column(key), pointStyle, pointRadius: 5, borderWidth: 2,
      borderColor: charts.colour(number), backgroundColor: charts.colour(number), borderDash: key === "bound" ? [6, 3] : [],
    })).filter(({ data: values }) => values.some((value) => value !== null));
    charts.draw(stages, {
      type: "line",
      data: { labels, datasets: series },
      options: { interaction: { mode: "index", intersect: false }, scales: { x: charts.axis("stage"), y: charts.axis("median over feature maps (model units)", { beginAtZero: true }) } },
    });
  }

  // -- learning

  for (const { title, values, unit } of data.learning) {
    const canvas = element("canvas", { class: "curve", role: "img", "aria-label": `${title}: ${values.join(", ")}` });
    main.querySelector(".multiples").append(element("figure", {}, element("figcaption", {}, `${title} `, element("small", {}, `(${unit})`)), element("div", { class: "chart small" }, canvas)));
    const known = values.filter((value) => value !== null);
    const logarithmic = unit === "λ" && Math.min(...known) > 0 && Math.max(...known) >= 10 * Math.min(...known);
    charts.draw(canvas, {
      type: "line",
      data: { labels: values.map((_, number) => number + 1), datasets: [{ data: values, borderColor: charts.colour(0), backgroundColor: charts.colour(0), pointRadius: 2.5, borderWidth: 1.5 }] },
      options: { plugins: { legend: { display: false } }, scales: { x: charts.axis("check", { ticks: { maxRotation: 0, autoSkipPadding: 12, color: charts.named("--soft") } }), y: { ...charts.axis(""), title: { display: false }, type: logarithmic ? "logarithmic" : "linear" } } },
    });
  }
};
