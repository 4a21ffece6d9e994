"use strict";
// Filters and sorts the table of runs. The page says all of it without this script.
(() => {
  const form = document.getElementById("controls");
  const body = document.querySelector("#matrix tbody");
  const rows = [...body.rows];
  const count = document.getElementById("count");
  const runs = body.querySelectorAll(".run").length;
  const chosen = name => form.elements[name].value;

  const shown = row => [...row.querySelectorAll("td:not([hidden]) .run:not([hidden])")];
  const numbers = (row, name) => shown(row).map(run => run.dataset[name]).filter(Boolean).map(Number);
  const least = name => row => Math.min(Infinity, ...numbers(row, name));
  const largest = name => row => -Math.max(-Infinity, ...numbers(row, name));
  const keys = {
    given: row => rows.indexOf(row),
    name: row => row.dataset.concept,
    carrier: least("start"),
    effect: largest("estimate"),
    share: largest("share"),
  };

  function filter() {
    const words = chosen("words").toLowerCase().split(/\s+/).filter(Boolean);
    const model = form.elements.model ? chosen("model") : "";
    for (const cell of document.querySelectorAll("#matrix [data-model]")) cell.hidden = model && cell.dataset.model !== model;
    for (const row of rows) {
      for (const run of row.querySelectorAll(".run")) {
        const text = `${row.dataset.concept} ${run.closest("td").dataset.label} ${run.textContent}`.toLowerCase();
        const state = chosen("state"), kind = chosen("kind");
        run.hidden = !(words.every(word => text.includes(word)) && (!state || run.dataset.state === state)
          && (!kind || run.dataset.kind === kind));
      }
      row.hidden = shown(row).length === 0;
    }
  }

  function update() {
    filter();
    const key = keys[chosen("sort")];
    const compare = (a, b) => typeof a === "string" ? a.localeCompare(b) : a < b ? -1 : a > b ? 1 : 0;
    const keyed = rows.map((row, place) => [key(row), place, row]);
    keyed.sort((a, b) => compare(a[0], b[0]) || a[1] - b[1]);
    body.append(...keyed.map(([, , row]) => row));
    const left = rows.reduce((sum, row) => sum + (row.hidden ? 0 : shown(row).length), 0);
    count.textContent = left === runs ? `${runs} shown` : `${left} of ${runs} shown`;
  }

  form.addEventListener("input", update);
  form.addEventListener("reset", () => setTimeout(update));
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
  update();  // a browser keeps what was chosen when a page is loaded again
})();
