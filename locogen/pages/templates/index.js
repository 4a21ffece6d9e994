"use strict";
// Filters and sorts the table of runs, and says the numbers of the heat strips. The page says all of it without this script.
(() => {
  // --- strips: the cell under the mouse, or the one chosen with the arrow keys, has its number and leads to its pictures ---

  for (const strip of document.querySelectorAll(".cells-link")) {
    const cells = JSON.parse(strip.dataset.cells);
    const image = strip.querySelector("img");
    const readout = strip.querySelector(".readout");
    const label = image.alt;
    let place = -1;

    const point = next => {
      place = Math.max(0, Math.min(cells.length - 1, next));
      readout.textContent = cells[place][1];
      strip.setAttribute("aria-label", cells[place][1]);
      strip.href = strip.dataset.window + cells[place][0];
    };
    const leave = () => {
      readout.textContent = "";
      strip.setAttribute("aria-label", `${label} Arrow keys: each window.`);
    };
    const pointed = event => {
      const box = image.getBoundingClientRect();
      point(Math.floor((event.clientX - box.left) / box.width * cells.length));
    };
    strip.addEventListener("pointermove", pointed);
    strip.addEventListener("pointerdown", pointed);  // a finger does not move before it taps
    strip.addEventListener("pointerleave", leave);
    strip.addEventListener("focus", () => point(Math.max(0, place)));
    strip.addEventListener("blur", leave);
    strip.addEventListener("keydown", event => {
      const next = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: cells.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      point(next);
    });
    leave();
  }

  // --- filters ---

  const form = document.getElementById("controls");
  if (!form) return;
  const body = document.querySelector("#matrix tbody");
  const rows = [...body.rows];
  const others = [...document.querySelectorAll("tr.other")];
  const count = document.getElementById("count");
  const all = body.querySelectorAll(".run").length + others.length;
  const chosen = name => form.elements[name] ? form.elements[name].value : "";

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

  // Whether something with this text and these data is asked for; its model is looked at elsewhere.
  function isAskedFor(text, facts) {
    const words = chosen("words").toLowerCase().split(/\s+/).filter(Boolean);
    const state = chosen("state"), kind = chosen("kind");
    return words.every(word => text.toLowerCase().includes(word))
      && (!state || facts.state === state) && (!kind || facts.kind === kind);
  }

  function filter() {
    const model = chosen("model");
    for (const cell of document.querySelectorAll("#matrix [data-model]")) cell.hidden = model && cell.dataset.model !== model;
    for (const row of rows) {
      for (const run of row.querySelectorAll(".run")) {
        run.hidden = !isAskedFor(`${row.dataset.concept} ${run.closest("td").dataset.label} ${run.textContent}`, run.dataset);
      }
      row.hidden = shown(row).length === 0;
    }
    for (const row of others) {
      row.hidden = !isAskedFor(row.textContent, row.dataset) || Boolean(model && row.dataset.model !== model);
    }
    const section = document.getElementById("others");
    if (section) section.hidden = others.every(row => row.hidden);
  }

  function update() {
    filter();
    const key = keys[chosen("sort")];
    const compare = (a, b) => typeof a === "string" ? a.localeCompare(b) : a < b ? -1 : a > b ? 1 : 0;
    const keyed = rows.map((row, place) => [key(row), place, row]);
    keyed.sort((a, b) => compare(a[0], b[0]) || a[1] - b[1]);
    body.append(...keyed.map(([, , row]) => row));
    const left = rows.reduce((sum, row) => sum + (row.hidden ? 0 : shown(row).length), 0)
      + others.filter(row => !row.hidden).length;
    count.textContent = left === all ? `${all} shown` : `${left} of ${all} shown`;
  }

  // --- the address has what was chosen, as #model=mini&state=open: it can be sent, and Back finds it again ---

  const fields = [...form.elements].filter(field => field.name);

  function write() {
    const values = fields.filter(field => field.value && field.value !== usual(field)).map(field => [field.name, field.value]);
    const hash = new URLSearchParams(values).toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }

  const usual = field => field.options ? field.options[0].value : "";

  function read() {
    if (!location.hash.includes("=")) return;
    const values = new URLSearchParams(location.hash.slice(1));
    for (const field of fields) {
      field.value = values.get(field.name) || usual(field);
      // A value that is not among the options selects nothing.
      if (field.options && field.selectedIndex < 0) field.selectedIndex = 0;
    }
  }

  const change = () => { update(); write(); };
  form.addEventListener("input", change);
  form.addEventListener("reset", () => setTimeout(change));
  form.addEventListener("submit", event => event.preventDefault());
  window.addEventListener("hashchange", () => { read(); update(); });
  window.addEventListener("pageshow", () => { read(); update(); });  // a browser may keep what was chosen
  form.hidden = false;
  read();
  update();
})();
