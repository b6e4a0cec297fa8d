// Parts that several sections use.

import { h } from "./dom.js";
import { DASH, hue } from "./format.js";

const classes = (...names) => names.filter(Boolean).join(" ") || null;

export const badge = (precision) => h("span", { class: `badge ${hue(precision)}` }, precision);

export const chip = (kind, ...text) => h("span", { class: `chip ${kind}` }, ...text);

export const empty = (...text) => h("p", { class: "empty" }, ...text);

// A table whose rows become blocks on a narrow screen; `columns` are titles, with `numeric` ones aligned to the right.
export function table(caption, columns, rows) {
  const titles = columns.map((column) => (typeof column === "string" ? { title: column } : column));
  const cells = (row) =>
    row.cells.map((cell, place) =>
      h(
        "td",
        {
          "data-title": titles[place].title,
          class: classes(titles[place].numeric && "numeric", cell === DASH && "none"),
        },
        cell,
      ),
    );
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", { class: "hidden" }, caption),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          titles.map(({ title, numeric }) => h("th", { scope: "col", class: numeric ? "numeric" : null }, title)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) => h("tr", { "data-key": row.key, class: row.kind }, cells(row))),
      ),
    ),
  );
}
