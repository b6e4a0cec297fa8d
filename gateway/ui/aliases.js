// Aliases: the ladder of each, who answers now, and how requests were divided lately.

import { h } from "./dom.js";
import { DASH, percent, seconds } from "./format.js";
import { badge, chip, empty } from "./parts.js";

const MEASURES = {
  top1_agreement: "top-1 ≥",
  kl_mean: "KL ≤",
  kl_p99: "KL p99 ≤",
  perplexity_ratio: "ppl ≤",
  length_ratio: "length ≤",
};

export function aliasCards(status) {
  if (!status.aliases.length) return empty("No aliases are configured.");
  return status.aliases.map((alias) => aliasCard(alias, status.traffic.recent_seconds));
}

function aliasCard(alias, recentSeconds) {
  const floor = Object.entries(alias.floor).map(([measure, limit]) => `${MEASURES[measure] ?? measure} ${limit}`);
  return h(
    "article",
    { class: "card alias", "data-key": alias.name, "aria-label": `alias ${alias.name}` },
    h(
      "div",
      { class: "heading" },
      h("h3", {}, alias.name),
      floor.length
        ? h(
            "span",
            { class: "quiet", title: "the least measured quality that may answer" },
            `floor ${floor.join(", ")}`,
          )
        : null,
    ),
    answersNow(alias),
    h("ol", { class: "ladder" }, alias.rungs.map(rungRow), alias.canary ? canaryRow(alias.canary) : null),
    h("p", { class: "quiet" }, traffic(alias, recentSeconds)),
  );
}

function answersNow(alias) {
  const now = alias.answers_now;
  if (!now) {
    return h("p", { class: "now" }, chip("bad", "nobody answers"), ` ${whyNobody(alias.rungs)}`);
  }
  const kind = now.reason === "preferred" ? "ok" : "warn";
  return h(
    "p",
    { class: "now" },
    badge(now.precision),
    h("strong", {}, now.replica),
    h("span", { class: "quiet" }, "answers now"),
    chip(kind, now.reason),
  );
}

function whyNobody(rungs) {
  const permitted = rungs.filter((rung) => !rung.rejected);
  if (!permitted.length) return "no variant meets the floor";
  return permitted.some((rung) => rung.replicas_ready) ? "no replica has room: requests wait" : "no replica is ready";
}

function rungRow(rung) {
  return h(
    "li",
    { class: `rung ${rung.state}`, "data-key": rung.variant },
    badge(rung.precision),
    h("span", { class: "name" }, rung.variant),
    rungState(rung),
    bar(rung.share, rung.precision, facts(rung)),
    rung.rejected ? h("span", { class: "why" }, rung.rejected) : null,
  );
}

function facts(rung) {
  const ready = `${rung.replicas_ready}/${rung.replicas} ready`;
  return rung.wait_seconds === null ? ready : `${ready} · wait ${seconds(rung.wait_seconds)}`;
}

function rungState(rung) {
  const { gate } = rung;
  if (rung.state === "rejected") return chip("idle", "may not answer");
  if (rung.state === "no_replica") return chip("bad", "no replica");
  if (gate.state === "spilling") return chip("warn", `spilling ${percent(gate.share_down)}`);
  return rung.state === "answers" ? chip("ok", "answers") : chip("idle", "ready");
}

function canaryRow(canary) {
  return h(
    "li",
    { class: "rung canary", "data-key": `canary ${canary.variant}` },
    badge(canary.precision),
    h("span", { class: "name" }, canary.variant),
    chip("info", `canary ${percent(canary.weight)}`),
    bar(canary.share, canary.precision, "of new conversations"),
  );
}

function bar(share, precision, note) {
  const label = share === null ? DASH : percent(share);
  return h(
    "span",
    { class: "share", title: "share of the answers of the last minutes" },
    h("span", { class: `fill ${badge(precision).classList[1]}`, vars: { "--share": String(share ?? 0) } }),
    h("span", { class: "label" }, label),
    h("span", { class: "quiet" }, note),
  );
}

function traffic(alias, recentSeconds) {
  const parts = [`${alias.requests} requests in ${Math.round(recentSeconds / 60)} min`];
  if (alias.failed) parts.push(`${alias.failed} failed`);
  if (alias.waiting) parts.push(`${alias.waiting} waiting`);
  return parts.join(" · ");
}
