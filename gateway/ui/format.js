// Values for people.

export const DASH = "–";

export function number(value, digits = 1) {
  if (value === null || value === undefined) return DASH;
  if (value !== 0 && Math.abs(value) < 1 && digits > 0) return value.toPrecision(2);
  return value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) >= 100 ? 0 : digits });
}

export const percent = (share, digits = 0) =>
  share === null || share === undefined ? DASH : `${(100 * share).toFixed(digits)} %`;

export function seconds(value) {
  if (value === null || value === undefined) return DASH;
  if (value < 0.0005) return "0 s";
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  return value < 10 ? `${value.toFixed(1)} s` : duration(value);
}

// Two units at most: 42 s, 3 min 07 s, 5 h 12 min, 8 d 3 h.
export function duration(value) {
  const whole = Math.floor(value);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  if (whole < 86400)
    return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

export function bytes(value) {
  if (value === null || value === undefined) return DASH;
  for (const [unit, size] of [
    ["TB", 1e12],
    ["GB", 1e9],
    ["MB", 1e6],
    ["kB", 1e3],
  ]) {
    if (value >= size) return `${(value / size).toFixed(value >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${value} B`;
}

export const timeOfDay = (at) => new Date(1000 * at).toLocaleTimeString("en-GB");

const HUES = {
  bf16: "blue",
  fp16: "blue",
  fp32: "blue",
  int8: "teal",
  fp8: "green",
  int4: "orange",
  fp4: "orange",
  external: "violet",
};
const ORDER = ["fp32", "bf16", "fp16", "int8", "fp8", "int4", "fp4", "external"];

// The hue of a precision: one name everywhere, in badges, bars and the chart.
export const hue = (precision) => HUES[precision] ?? "slate";

export function byPrecision(first, second) {
  const place = (name) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length);
  return place(first) - place(second) || first.localeCompare(second);
}
