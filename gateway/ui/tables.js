// Replicas, variants and errors.

import { h } from "./dom.js";
import { bytes, DASH, duration, number, percent, seconds, timeOfDay } from "./format.js";
import { badge, chip, empty, table } from "./parts.js";

const STATES = {
  ready: "ok",
  starting: "info",
  warming: "info",
  draining: "warn",
  stopping: "warn",
  stopped: "idle",
  failed: "bad",
};
const VERDICTS = { pass: "ok", fail: "bad" };
const right = (title) => ({ title, numeric: true });

export function replicaTable(status) {
  if (!status.replicas.length)
    return empty(
      "There are no replicas: ",
      h("code", {}, "quantgate serve"),
      " starts them, or give one with its url.",
    );
  const columns = [
    "replica",
    "state",
    right("in flight"),
    right("running"),
    right("queue"),
    "KV cache",
    right("wait"),
    "breaker",
    "address",
  ];
  return table("Replicas", columns, status.replicas.map(replicaRow));
}

function replicaRow(replica) {
  const since = h("span", { class: "quiet" }, `for ${duration(replica.state_seconds)}`);
  const unwell = replica.silence === "responsive" ? null : chip("bad", replica.silence);
  return {
    key: replica.id,
    cells: [
      h("span", { class: "pair whole" }, badge(replica.precision), h("strong", {}, replica.id)),
      h(
        "span",
        { class: "pair" },
        chip(STATES[replica.state] ?? "idle", replica.state),
        unwell,
        replica.reason ? h("span", { class: replica.state === "failed" ? "problem" : "quiet" }, replica.reason) : since,
      ),
      `${replica.in_flight}`,
      number(replica.running, 0),
      number(replica.waiting, 0),
      meter(replica.kv_usage, `KV cache of ${replica.id}`),
      replica.state === "ready" && !replica.load_known ? chip("warn", "load unknown") : seconds(replica.wait_seconds),
      replica.breaker === "closed"
        ? h("span", { class: "quiet" }, "closed")
        : chip("bad", replica.breaker.replace("_", "-")),
      h("span", { class: "quiet address" }, replica.url),
    ],
  };
}

function meter(share, label) {
  if (share === null) return DASH;
  const kind = share > 0.9 ? "bad" : share > 0.75 ? "warn" : "ok";
  return h(
    "span",
    { class: "pair whole" },
    h("span", {
      class: `meter ${kind}`,
      role: "meter",
      "aria-label": label,
      "aria-valuenow": Math.round(100 * share),
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      vars: { "--share": String(share) },
    }),
    percent(share),
  );
}

export function variantTable(status) {
  if (!status.variants.length) return empty("No variants are configured.");
  const columns = [
    "variant",
    "quality",
    right("top-1"),
    right("KL mean"),
    right("perplexity"),
    right("size"),
    right("one answer"),
    right("at most"),
    right("ready"),
  ];
  return table("Variants", columns, status.variants.map(variantRow));
}

function variantRow(variant) {
  const measures = Object.fromEntries(variant.measures.map((each) => [each.name, each]));
  const scheme = [variant.scheme, variant.base].filter(Boolean).join(" of ");
  return {
    key: variant.name,
    cells: [
      h(
        "span",
        { class: "pair" },
        badge(variant.precision),
        h("strong", {}, variant.name),
        scheme ? h("span", { class: "quiet" }, scheme) : null,
      ),
      quality(variant),
      measure(measures.top1_agreement, (value) => percent(value, 1), "≥"),
      measure(measures.kl_mean, (value) => value.toFixed(4), "≤"),
      measure(measures.perplexity_ratio, (value) => `×${value.toFixed(3)}`, "≤"),
      bytes(variant.bytes),
      variant.speed ? `${number(variant.speed.answer_tokens_per_second)} tok/s` : DASH,
      variant.speed ? `${number(variant.speed.total_tokens_per_second)} tok/s` : DASH,
      `${variant.replicas_ready}`,
    ],
  };
}

function quality(variant) {
  if (variant.verdict) return chip(VERDICTS[variant.verdict] ?? "idle", `measured, ${variant.verdict}`);
  return chip(variant.source === "unknown" ? "warn" : "idle", variant.source);
}

// A figure, with the worse end of its interval where that differs: floors are held against it.
function measure(figure, text, sign) {
  if (!figure) return DASH;
  const bound =
    figure.bound === figure.value
      ? null
      : h(
          "span",
          { class: "quiet bound", title: "with 95 % confidence; floors are held against it" },
          `${sign} ${text(figure.bound)}`,
        );
  return h("span", {}, text(figure.value), bound);
}

export function errorTable(status) {
  if (!status.errors.length) return empty("No request has failed since this process started.");
  const columns = ["last", "code", "alias", "replica", "message", right("count"), "request"];
  return table("Last errors", columns, status.errors.map(errorRow));
}

function errorRow(error) {
  return {
    key: `${error.alias} ${error.code} ${error.replica}`,
    cells: [
      h("time", { datetime: new Date(1000 * error.at).toISOString() }, timeOfDay(error.at)),
      chip(/^4/.test(error.code) && error.code !== "429" ? "idle" : "bad", error.code),
      error.alias,
      error.replica === "none" ? DASH : error.replica,
      h("span", { class: "message" }, error.message),
      number(error.count, 0),
      h("button", { type: "button", class: "link", "data-explain": error.request_id }, "why?"),
    ],
  };
}
