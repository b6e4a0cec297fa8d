// Rollouts: steps, gates, and the commands that are possible in each phase.

import { h } from "./dom.js";
import { DASH, duration, number, percent } from "./format.js";
import { chip, empty, table } from "./parts.js";

const KINDS = { done: "ok", rolled_back: "bad", failed: "bad", rolling_back: "bad", paused: "warn", holding: "warn" };
const STEERABLE = ["preflight", "starting", "smoke", "shadow", "canary"];
const VERDICTS = { pass: "ok", fail: "bad", more: "idle" };

export const COMMANDS = {
  promote: { title: "Promote", text: "The next step begins now, before its gates have passed. They go on comparing." },
  pause: { title: "Pause", text: "The weight stays as it is. Gates still end a rollout that fails." },
  resume: { title: "Resume", text: "The rollout goes on from the phase that it paused in." },
  abort: { title: "Abort", text: "All conversations go back to the old variant, and the rollout ends." },
};

export function rolloutCards(status) {
  if (!status.rollouts.length) {
    return h(
      "div",
      { class: "card" },
      empty("No rollout runs. ", h("code", {}, "quantgate rollout start ALIAS NEW"), " starts one."),
    );
  }
  return status.rollouts.map(rolloutCard);
}

function rolloutCard(rollout) {
  const left = rollout.deadline_seconds;
  return h(
    "article",
    { class: "card rollout", "data-key": rollout.rollout, "aria-label": `rollout of ${rollout.alias}` },
    h(
      "div",
      { class: "heading" },
      h("h3", {}, rollout.alias, h("span", { class: "change" }, `${rollout.old} → ${rollout.new}`)),
      chip(KINDS[rollout.phase] ?? "info", rollout.phase.replace("_", " ")),
      h(
        "span",
        { class: "quiet" },
        rollout.phase_seconds === null ? "" : `for ${duration(rollout.phase_seconds)}`,
        left !== null && left > 0 ? `, at most ${duration(left)} more` : "",
      ),
      h(
        "div",
        { class: "actions" },
        // One that this version cannot read has no steps, and cannot be steered.
        (rollout.steps.length ? commandsIn(rollout.phase) : []).map((name) => commandButton(name, rollout)),
      ),
    ),
    steps(rollout),
    notes(rollout),
    gates(rollout),
  );
}

function commandsIn(phase) {
  if (STEERABLE.includes(phase))
    return phase === "canary" || phase === "shadow" ? ["promote", "pause", "abort"] : ["pause", "abort"];
  if (phase === "paused") return ["resume", "promote", "abort"];
  return phase === "draining" || phase === "keeping" ? ["abort"] : [];
}

function commandButton(name, rollout) {
  const attributes = {
    type: "button",
    "data-command": name,
    "data-alias": rollout.alias,
    "data-rollout": rollout.rollout,
    "data-phase": rollout.phase,
    "data-step": rollout.step,
    "data-change": `${rollout.old} → ${rollout.new}`,
  };
  return h(
    "button",
    { ...attributes, class: name === "abort" ? "danger" : null, "data-key": name },
    COMMANDS[name].title,
  );
}

function steps(rollout) {
  const done = ["draining", "keeping", "done"].includes(rollout.phase);
  const kind = (place) =>
    done || place < rollout.step ? "past" : place === rollout.step && rollout.weight > 0 ? "current" : "future";
  const label = (place) => ({ past: "passed", current: "current step", future: "to come" })[kind(place)];
  return h(
    "ol",
    { class: "steps", "aria-label": `weight ${percent(rollout.weight)}` },
    rollout.steps.map((step, place) =>
      h(
        "li",
        { class: kind(place), "aria-current": kind(place) === "current" ? "step" : null, title: label(place) },
        `${step} %`,
      ),
    ),
  );
}

function notes(rollout) {
  const { canary_conversations: canary, stable_conversations: stable } = rollout;
  const conversations = rollout.steps.length
    ? `${canary} conversations on ${rollout.new}, ${stable} on ${rollout.old}`
    : "no figures";
  return h(
    "p",
    { class: "quiet" },
    conversations,
    rollout.waits_for ? ` · waits for ${rollout.waits_for}` : "",
    rollout.driver ? "" : " · no gateway drives it",
    rollout.failure ? h("strong", { class: "problem" }, ` · ${rollout.failure}`) : null,
    rollout.pause ? h("strong", {}, ` · ${rollout.pause}`) : null,
  );
}

function gates(rollout) {
  const arms = (counts) => (counts ? `${counts[0]} of ${counts[1]}` : DASH);
  const ratio = (interval) =>
    interval ? `${interval[1].toFixed(3)} (${interval[0].toFixed(3)}–${interval[2].toFixed(3)})` : DASH;
  const rows = rollout.gates.map((gate) => ({
    key: gate.name,
    cells: [
      gate.name.replaceAll("_", " "),
      chip(VERDICTS[gate.verdict] ?? "idle", gate.verdict === "more" ? "not shown yet" : gate.verdict),
      arms(gate.canary),
      arms(gate.stable),
      ratio(gate.ratio),
      needs(gate),
    ],
  }));
  const columns = [
    "gate",
    "verdict",
    { title: "new", numeric: true },
    { title: "old", numeric: true },
    { title: "ratio", numeric: true },
    { title: "needs", numeric: true },
  ];
  return h(
    "details",
    { open: innerWidth > 680 },
    h("summary", {}, `Gates: ${summary(rollout.gates)}`),
    table(`Gates of the rollout of ${rollout.alias}`, columns, rows),
  );
}

// How many more conversations decide a gate; beyond a million it is a guess.
function needs({ needs_conversations: count, needs_minutes: minutes }) {
  if (count === undefined) return DASH;
  if (count === null || count >= 1e6) return "many more";
  return minutes ? `${number(count, 0)} more, ${duration(60 * minutes)}` : `${number(count, 0)} more`;
}

function summary(gates) {
  const count = (verdict) => gates.filter((gate) => gate.verdict === verdict).length;
  return (
    [
      [count("pass"), "pass"],
      [count("more"), "not shown yet"],
      [count("fail"), "fail"],
    ]
      .filter(([many]) => many)
      .map(([many, text]) => `${many} ${text}`)
      .join(", ") || "none"
  );
}
