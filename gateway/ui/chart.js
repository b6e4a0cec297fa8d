// The chart of the last hour: areas of all precisions, stacked. Drawn by uPlot (vendor/).

import { byId, h, show } from "./dom.js";
import { byPrecision, hue, number } from "./format.js";
import { badge } from "./parts.js";

const HEIGHT = 230;
const HOUR = 3600;
const UNITS = { answer_tokens_per_second: "tokens/s", requests_per_second: "requests/s" };

export class TrafficChart {
  constructor(parent, measure) {
    this.parent = parent;
    this.measure = measure;
    this.plot = null;
    this.drawn = "";
    this.traffic = null;
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(parent);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw(true));
  }

  use(measure) {
    this.measure = measure;
    this.draw(true);
  }

  update(traffic, now) {
    this.traffic = traffic;
    this.now = now;
    this.draw(false);
  }

  size() {
    return { width: Math.max(this.parent.clientWidth, 200), height: HEIGHT };
  }

  draw(anew) {
    if (!this.traffic) return;
    const names = [...new Set(this.traffic.points.flatMap((point) => Object.keys(point.precisions)))].sort(byPrecision);
    const { times, values, sums } = stacked(this.traffic.points, names, this.measure);
    this.values = values;
    const data = [times, ...sums.toReversed()];
    const kind = `${names} ${this.measure}`;
    if (!this.plot || anew || kind !== this.drawn) {
      this.plot?.destroy();
      this.drawn = kind;
      // Bound as a global by the library's own file, which is used as it is published.
      this.plot = new globalThis.uPlot(this.options(names), data, this.parent);
    } else {
      this.plot.setData(data, false);
    }
    this.plot.setScale("x", { min: this.now - HOUR, max: this.now });
    this.describe(names);
  }

  describe(names) {
    const recent = this.traffic.recent;
    const rate = (name) => recent?.precisions[name]?.[this.measure] ?? 0;
    const unit = UNITS[this.measure];
    const rows = names.map((name) => h("li", { "data-key": name }, badge(name), `${number(rate(name))} ${unit}`));
    show(byId("chart-summary"), rows.length ? rows : h("li", {}, "No traffic yet."));
    const text = names.map((name) => `${name} ${number(rate(name))} ${unit}`).join(", ") || "none";
    this.parent.setAttribute("aria-label", `Traffic by precision; in the last five minutes: ${text}`);
  }

  options(names) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: colour("--quiet"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui",
    };
    const series = names.toReversed().map((name, place) => ({
      label: name,
      stroke: colour(`--${hue(name)}-line`),
      fill: colour(`--${hue(name)}-area`),
      width: 1.5,
      points: { show: false },
      value: (_, __, ___, index) => (index === null ? "–" : number(this.values[names.length - 1 - place][index])),
    }));
    return {
      ...this.size(),
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { show: false }, y: false },
      scales: { x: { time: true, auto: false }, y: { range: (_, __, high) => [0, Math.max(1.1 * high, 0.1)] } },
      series: [{}, ...series],
      // A lower area covers the part of a higher one that is not its own.
      bands: names.slice(1).map((_, place) => ({ series: [place + 1, place + 2] })),
      axes: [
        { ...axis, size: 28, values: (_, ticks) => ticks.map(clock) },
        { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => number(tick)) },
      ],
    };
  }
}

const clock = (at) => new Date(1000 * at).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });

// The rates of each precision, and the sums with those below it, the first name at the bottom.
function stacked(points, names, measure) {
  const values = names.map((name) => points.map((point) => point.precisions[name]?.[measure] ?? 0));
  const sums = [];
  for (const row of values) sums.push(row.map((value, index) => value + (sums.at(-1)?.[index] ?? 0)));
  return { times: points.map((point) => point.at), values, sums };
}
