// Chart.js with the colours of the page, light or dark, without animation.
"use strict";
marginclip.charts = (() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const COLOURS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8"];
  const colour = (number) => () => css(COLOURS[number % COLOURS.length]);
  const named = (name) => () => css(name);
  const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]];

  Chart.defaults.animation = false;
  Chart.defaults.maintainAspectRatio = false;
  Chart.defaults.font.family = "system-ui, sans-serif";
  Chart.defaults.color = named("--soft");
  Chart.defaults.plugins.legend.labels.usePointStyle = true;
  Chart.defaults.plugins.legend.labels.boxHeight = 7;

  const axis = (title, options = {}) => ({
    title: { display: true, text: title, color: named("--soft") },
    ticks: { color: named("--soft"), maxRotation: 40 },
    grid: { color: named("--line") },
    ...options,
  });

  function draw(canvas, config) {
    const chart = new Chart(canvas, config);
    marginclip.left.push(() => chart.destroy());
    return chart;
  }

  const short = (text, most = 40) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

  function stepped(label, edges, counts, total, number) {
    const points = counts.map((count, place) => ({ x: edges[place], y: (100 * count) / total }));
    points.push({ x: edges[edges.length - 1], y: points[points.length - 1].y });
    return {
      label: `${label} (${total} images)`, data: points, stepped: "after", fill: "origin", pointRadius: 0, borderWidth: 1.5,
      borderColor: colour(number), backgroundColor: () => `${css(COLOURS[number])}66`, borderDash: DASHES[number], pointStyle: number ? "triangle" : "rect",
    };
  }

  function rocLine(points, label, number) {
    return {
      label: short(label), data: points.map(([threshold, x, y]) => ({ x: 100 * x, y: 100 * y, threshold })), showLine: true, borderWidth: 2,
      borderColor: colour(number), backgroundColor: colour(number), pointRadius: 1.5, pointHoverRadius: 5, tension: 0,
      borderDash: DASHES[Math.floor(number / COLOURS.length) % DASHES.length],
    };
  }

  function roc(canvas, lines) {
    const lowest = { min: 0, max: 100 };
    const said = (point) => `${point.dataset.label}: threshold ${point.raw.threshold.toPrecision(4)}, FPR ${point.raw.x.toFixed(2)} %, TPR ${point.raw.y.toFixed(1)} %`;
    return draw(canvas, {
      type: "scatter",
      data: { datasets: lines },
      options: {
        interaction: { mode: "nearest", intersect: false },
        scales: { x: axis("false positives (% of clean images)", lowest), y: axis("true positives (% of triggered images)", lowest) },
        plugins: { tooltip: { callbacks: { label: said } }, legend: { display: lines.length < 12 } },
      },
    });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => Object.values(Chart.instances).forEach((chart) => chart.update()));
  return { css, colour, named, axis, draw, stepped, rocLine, roc, short };
})();
