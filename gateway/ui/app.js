// The status page: follows the status of the gateway, and shows each section of it.

import { aliasCards } from "./aliases.js";
import { call, KeyNeeded, post, problemOf, StatusStream, storedKey, storeKey } from "./api.js";
import { TrafficChart } from "./chart.js";
import { byId, h, show } from "./dom.js";
import { explanationOf } from "./explanation.js";
import { duration, number } from "./format.js";
import { COMMANDS, rolloutCards } from "./rollouts.js";
import { errorTable, replicaTable, variantTable } from "./tables.js";
import { Trial } from "./trial.js";

const chart = new TrafficChart(byId("chart"), "answer_tokens_per_second");
const trial = new Trial();
const stream = new StatusStream({ onStatus: showStatus, onState: showConnection, onKeyNeeded: askForKey });

function showStatus(status) {
  show(byId("aliases-list"), aliasCards(status));
  show(byId("rollouts-list"), rolloutCards(status));
  show(byId("replicas-list"), replicaTable(status));
  show(byId("variants-list"), variantTable(status));
  show(byId("errors-list"), errorTable(status));
  show(byId("figures"), figures(status));
  chart.update(status.traffic, status.gateway.now_at);
  trial.update(status);
  showGateway(status);
}

function showGateway({ gateway, replicas }) {
  const { worker } = gateway;
  const several = worker.of > 1 ? `worker ${worker.number} of ${worker.of}` : "";
  const ready = replicas.filter((replica) => replica.state === "ready").length;
  document.title = `${ready}/${replicas.length} ready · quantgate`;
  byId("gateway").textContent =
    `${gateway.version} · up ${duration(gateway.now_at - gateway.started_at)}${several && ` · ${several}`}`;
  const whole =
    worker.of > 1
      ? `Traffic, errors and requests in flight are those of ${several}; each has its own admin port.`
      : "";
  byId("footer").textContent = `${whole} Process ${worker.process_id}; data from /admin/status.`;
  const away = [
    gateway.state_database && `The state database is away: ${gateway.state_database}`,
    gateway.kubernetes && `Kubernetes is away: ${gateway.kubernetes}`,
  ];
  notify(away.filter(Boolean).join(" "), "state");
  byId("key").hidden = !storedKey();
}

function figures({ traffic, gateway, aliases, replicas }) {
  const rates = Object.values(traffic.recent?.precisions ?? {});
  const sum = (name) => rates.reduce((total, rate) => total + rate[name], 0);
  const waiting = aliases.reduce((total, alias) => total + alias.waiting, 0);
  const ready = replicas.filter((replica) => replica.state === "ready").length;
  const failed = traffic.recent?.failed_per_second ?? 0;
  const rows = [
    ["Requests", number(sum("requests_per_second")), "/s"],
    ["Answer tokens", number(sum("answer_tokens_per_second")), "/s"],
    ["Failed", number(failed), "/s", failed > 0 ? "bad" : null],
    ["In flight", number(gateway.in_flight, 0), ""],
    ["Waiting", number(waiting, 0), "", waiting ? "warn" : null],
    ["Replicas ready", `${ready}`, ` of ${replicas.length}`, ready < replicas.length ? "warn" : null],
  ];
  return rows.map(([title, value, unit, kind]) =>
    h("div", { class: kind, "data-key": title }, h("dt", {}, title), h("dd", {}, value, h("small", {}, unit))),
  );
}

function showConnection(kind, text) {
  const shown = byId("connection");
  if (shown.textContent !== text) shown.textContent = text;
  shown.className = `chip ${kind}`;
  document.body.classList.toggle("stale", kind !== "ok");
}

// One notice at a time; `topic` lets a lasting one be withdrawn without hiding another.
function notify(text, topic, kind = "") {
  const notice = byId("notice");
  if (!text && notice.dataset.topic !== topic) return;
  if (notice.textContent !== text) notice.textContent = text;
  notice.dataset.topic = topic;
  notice.className = `notice ${kind}`;
  notice.hidden = !text;
}

// Commands

async function steer(button) {
  // As they are now: the page goes on while the dialog is open.
  const { command, alias, change, rollout, phase, step } = button.dataset;
  const seen = command === "abort" ? { rollout } : { rollout, phase, step: Number(step) };
  const { title, text } = COMMANDS[command];
  byId("confirm-title").textContent = `${title} the rollout of ${alias}?`;
  byId("confirm-text").textContent = `${change}. ${text}`;
  byId("confirm-yes").textContent = title;
  byId("confirm-yes").className = command === "abort" ? "danger" : "primary";
  byId("confirm-reason").value = "";
  if ((await answerOf(byId("confirm"))) !== "yes") return;
  try {
    const answer = await post(`rollouts/${command}`, { alias, reason: byId("confirm-reason").value, ...seen });
    if (answer.ok)
      notify(`${title}: the rollout of ${alias} is in phase ${(await answer.json()).phase}.`, "command", "ok");
    else notify(await problemOf(answer), "command", "bad");
  } catch (error) {
    if (error instanceof KeyNeeded) askForKey();
    else notify(`The gateway did not answer: ${error.message}`, "command", "bad");
  }
}

// The value of the button that closes a dialog; "" after Escape.
function answerOf(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

async function explain(id) {
  byId("request-id").value = id;
  const place = byId("explanation");
  try {
    const answer = await call(`routing/${encodeURIComponent(id)}/explanation`);
    show(place, answer.ok ? explanationOf(await answer.json()) : h("p", { class: "problem" }, await problemOf(answer)));
  } catch (error) {
    if (error instanceof KeyNeeded) askForKey();
    else show(place, h("p", { class: "problem" }, `The gateway did not answer: ${error.message}`));
  }
}

async function askForKey() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  byId("key").hidden = false;
  byId("key-problem").hidden = !storedKey();
  byId("key-problem").textContent = "This key was refused.";
  byId("key-input").value = "";
  if ((await answerOf(dialog)) === "yes") {
    storeKey(byId("key-input").value);
    stream.start();
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-command], button[data-explain]");
  if (button?.dataset.command) steer(button);
  if (button?.dataset.explain) {
    explain(button.dataset.explain);
    byId("request").scrollIntoView({ block: "start" });
    byId("request-id").focus({ preventScroll: true });
  }
});
byId("request-form").addEventListener("submit", (event) => {
  event.preventDefault();
  explain(byId("request-id").value.trim());
});
document.querySelector(".choice").addEventListener("change", (event) => chart.use(event.target.value));
byId("key").addEventListener("click", askForKey);
// Not a submit button: Enter in the reason confirms, while Enter twice on a command is Cancel, which has the focus.
byId("confirm-no").addEventListener("click", () => byId("confirm").close());
stream.start();
