// The try-it box: one chat request, streamed, with the headers of its response.

import { events, post, problemOf } from "./api.js";
import { byId, h, show } from "./dom.js";
import { byPrecision, number } from "./format.js";
import { badge } from "./parts.js";

export class Trial {
  constructor() {
    this.form = byId("trial-form");
    this.abort = null;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(new FormData(this.form));
    });
    byId("trial-stop").addEventListener("click", () => this.abort?.abort());
  }

  update(status) {
    const models = [...status.aliases, ...status.variants].map((each) => each.name);
    const precisions = [...new Set(status.variants.map((each) => each.precision))].sort(byPrecision);
    options(
      byId("trial-model"),
      models.map((name) => [name, name]),
    );
    options(byId("trial-precision"), [["", "any"], ...precisions.map((name) => [name, name])]);
    byId("trial-key").hidden = !status.gateway.keys_required;
  }

  async send(fields) {
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    const answer = byId("trial-answer");
    answer.textContent = "";
    answer.hidden = false;
    byId("trial-hint").hidden = true;
    show(byId("trial-outcome"));
    byId("trial-stop").hidden = false;
    try {
      await this.stream(fields, abort.signal, answer);
    } catch (error) {
      show(
        byId("trial-outcome"),
        h(
          "p",
          { class: abort.signal.aborted ? "quiet" : "problem" },
          abort.signal.aborted ? "Stopped." : `Not answered: ${error.message || "the admin key is missing"}`,
        ),
      );
    } finally {
      if (this.abort === abort) byId("trial-stop").hidden = true;
    }
  }

  async stream(fields, signal, answer) {
    const started = performance.now();
    const body = {
      model: fields.get("model"),
      messages: [{ role: "user", content: fields.get("message") }],
      max_tokens: Number(fields.get("tokens")) || 256,
      stream: true,
    };
    const headers = {};
    if (fields.get("key")) headers["x-quantgate-key"] = fields.get("key");
    if (fields.get("precision")) headers["x-quantgate-precision"] = fields.get("precision");
    const response = await post("trial", body, { headers, signal });
    if (!response.ok) {
      answer.hidden = true;
      show(
        byId("trial-outcome"),
        h("p", { class: "problem" }, `${response.status}: ${await problemOf(response)}`),
        headerList(response),
      );
      return;
    }
    show(byId("trial-outcome"), headerList(response));
    let first = null;
    for await (const { data } of events(response)) {
      if (!data || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta ?? {};
      const text = delta.content || delta.reasoning_content || delta.reasoning || "";
      if (text) first ??= performance.now() - started;
      append(answer, text, !delta.content);
    }
    const all = performance.now() - started;
    const times = `first token after ${number(first ?? all, 0)} ms, all of it after ${number(all, 0)} ms`;
    show(byId("trial-outcome"), h("p", { class: "quiet" }, times), headerList(response));
  }
}

// Text of a thought is set apart from the answer.
function append(answer, text, thought) {
  if (!text) return;
  const kind = thought ? "thought" : "said";
  if (answer.lastElementChild?.className !== kind) answer.append(h("span", { class: kind }));
  answer.lastElementChild.append(text);
  answer.scrollTop = answer.scrollHeight;
}

function headerList(response) {
  const headers = [...response.headers].filter(([name]) => name.startsWith("x-"));
  const id = response.headers.get("x-request-id");
  return h(
    "div",
    { class: "headers" },
    h(
      "dl",
      {},
      headers.map(([name, value]) => [
        h("dt", {}, name),
        h("dd", {}, name === "x-quantgate-precision" ? badge(value) : value),
      ]),
    ),
    id ? h("button", { type: "button", "data-explain": id }, "Why there?") : null,
  );
}

// Change the options of a select only when they differ: a list that is open stays open.
function options(select, pairs) {
  const key = JSON.stringify(pairs);
  if (select.dataset.options === key) return;
  const chosen = select.value;
  select.dataset.options = key;
  select.replaceChildren(...pairs.map(([value, text]) => h("option", { value }, text)));
  if (pairs.some(([value]) => value === chosen)) select.value = chosen;
}
