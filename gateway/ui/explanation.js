// One decision, explained as `quantgate route explain --request ID` does.

import { h } from "./dom.js";
import { DASH, number, percent } from "./format.js";
import { badge, chip, table } from "./parts.js";

const TERMS = ["queue", "ahead", "kv", "reading", "cached", "answering", "total"];
const right = (title) => ({ title, numeric: true });
const cost = (value) => (value === null || value === undefined ? DASH : value.toFixed(3));

export function explanationOf({ recorded, explanation }) {
  return [
    headline(explanation),
    h("p", {}, explanation.because),
    h("p", { class: "quiet" }, request(explanation, recorded)),
    ...tables(explanation),
  ];
}

function headline({ model, chosen }) {
  if (!chosen) return h("p", { class: "now" }, h("strong", {}, model), chip("bad", "no replica"));
  return h(
    "p",
    { class: "now" },
    h("strong", {}, model),
    "→",
    badge(chosen.precision),
    h("strong", {}, chosen.replica),
    chip(chosen.reason === "preferred" ? "ok" : "warn", chosen.reason),
  );
}

function request(explanation, recorded) {
  const answer =
    explanation.answer_tokens === null
      ? "an answer of any length"
      : `an answer of at most ${explanation.answer_tokens} tokens`;
  const prompt = `A prompt of about ${number(explanation.prompt_tokens, 0)} tokens`;
  return `${prompt}, ${answer}; decided at ${new Date(recorded).toLocaleString("en-GB")}.`;
}

function tables({ rungs, candidates, refused, absent }) {
  const rows = [
    ["Rungs, best first", ["variant", right("wait in s"), "gate", "this request"], rungs.map(rungCells)],
    [
      "Replicas in the order of attempts; cost in seconds",
      [right("#"), "replica", right("requests"), ...TERMS.map(right), "why not"],
      candidates.map(candidateCells),
    ],
    ["Variants that may not answer", ["variant", "why"], refused.map((each) => [named(each), each.why])],
    [
      "Replicas that are not ready",
      ["replica", "variant", "state", "reason"],
      absent.map((each) => [each.id, each.variant, each.state, each.reason || DASH]),
    ],
  ];
  return rows
    .filter(([, , cells]) => cells.length)
    .flatMap(([title, columns, cells]) => [
      h("h3", {}, title),
      table(
        title,
        columns,
        cells.map((each, key) => ({ key, cells: each })),
      ),
    ]);
}

const named = (each) => h("span", { class: "pair whole" }, badge(each.precision), each.variant);

function rungCells(rung) {
  const gate =
    rung.spilling_seconds === null
      ? "closed"
      : `spilling for ${number(rung.spilling_seconds, 0)} s, ${percent(rung.share_down)} go down`;
  return [named(rung), cost(rung.wait_seconds), gate, rung.verdict];
}

function candidateCells(each) {
  const notes = [each.why_not, each.stale ? "no recent poll" : ""].filter(Boolean).join("; ");
  return [
    each.rank ?? DASH,
    h("span", { class: "pair whole" }, each.replica),
    number(each.requests, 0),
    ...TERMS.map((term) => cost(each.terms?.[term])),
    notes || chip("ok", "chosen"),
  ];
}
