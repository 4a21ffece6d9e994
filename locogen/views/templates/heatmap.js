// The heatmap of `explore`: a grid of windows to point at, walk on by arrow keys, and choose from.
// It also does what the other controls of the box cannot do for themselves: it gives the sliders'
// handles names, and keeps the static twin that is saved with the notebook as it is seen.

const KEYS = {
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  Home: [0, -Infinity],
  End: [0, Infinity],
};

function element(tag, attributes, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function between(value, least, most) {
  return Math.min(Math.max(value, least), most);
}

function cellOf(cell) {
  const made = element("div", { role: "gridcell", class: "loco-cell", "aria-label": cell.words });
  made.style.background = cell.color;
  made.style.color = cell.ink;
  made.append(element("span", {}, cell.layers), element("span", {}, cell.effect));
  return made;
}

function render({ model, el }) {
  const grid = element("div", {
    role: "grid",
    class: "loco-heatmap",
    "aria-label": model.get("title"),
  });
  // What is pointed at; a screen reader says the same words as the name of the cell.
  const line = element("p", { class: "loco-line", "aria-hidden": "true" }, model.get("hint"));
  const rows = model.get("rows");
  const cells = rows.map((row) => row.cells.map(cellOf));
  rows.forEach((row, i) => {
    const made = element("div", { role: "row", class: "loco-row" });
    made.append(element("span", { role: "rowheader", class: "loco-concept" }, row.concept));
    made.append(...cells[i]);
    grid.append(made);
  });
  el.append(grid, line);

  function say(words) {
    line.textContent = words;
  }

  // One cell is reached by the tab key: the chosen one, or where the arrow keys have led.
  function makeReachable(reached) {
    for (const cell of cells.flat()) cell.tabIndex = cell === reached ? 0 : -1;
  }

  function walk(i, j, [down, right]) {
    const row = between(i + down, 0, cells.length - 1);
    const column = between(j + right, 0, cells[row].length - 1);
    makeReachable(cells[row][column]);
    cells[row][column].focus();
  }

  function choose(i, j) {
    model.set("selected", [rows[i].concept, rows[i].cells[j].start]);
    model.save_changes();
  }

  function mark() {
    const [concept, start] = model.get("selected") ?? [];
    let marked = null;
    rows.forEach((row, i) =>
      row.cells.forEach((cell, j) => {
        const isChosen = row.concept === concept && cell.start === start;
        cells[i][j].setAttribute("aria-selected", String(isChosen));
        if (isChosen) marked = cells[i][j];
      }),
    );
    if (!grid.contains(document.activeElement)) makeReachable(marked ?? cells[0][0]);
  }

  cells.forEach((row, i) =>
    row.forEach((cell, j) => {
      const { words } = rows[i].cells[j];
      cell.addEventListener("pointerenter", () => say(words));
      cell.addEventListener("focus", () => say(words));
      cell.addEventListener("click", () => {
        makeReachable(cell);
        cell.focus();
        choose(i, j);
      });
    }),
  );
  function press(event) {
    const i = cells.findIndex((row) => row.includes(event.target));
    const isChosen = event.key === "Enter" || event.key === " ";
    const isShortcut = event.ctrlKey || event.metaKey || event.altKey;
    if (i < 0 || isShortcut || !(isChosen || event.key in KEYS)) return;
    event.preventDefault();
    event.stopPropagation();
    const j = cells[i].indexOf(event.target);
    if (isChosen) choose(i, j);
    else walk(i, j, KEYS[event.key]);
  }
  // Before the document hears of them: a notebook would take these keys as its own shortcuts.
  window.addEventListener("keydown", press, true);
  grid.addEventListener("pointerleave", () => say(model.get("hint")));
  grid.addEventListener("focusout", () => say(model.get("hint")));
  model.on("change:selected", mark);
  mark();
  const stopNaming = nameControls(el, model.get("names"));
  return () => {
    model.off("change:selected", mark);
    window.removeEventListener("keydown", press, true);
    stopNaming();
  };
}

// A slider of ipywidgets shows its description, but its handles and its number have no names; nor
// is what changes below the controls said. The other controls come and go after this one.
function nameControls(el, names) {
  function nameAll(box) {
    for (const control of box.querySelectorAll(".widget-slider, .widget-hslider")) {
      const name = control.querySelector(".widget-label")?.textContent;
      if (!(name in names)) continue;
      control.querySelectorAll(".noUi-handle").forEach((handle, i) => {
        handle.setAttribute("aria-label", names[name].handles[i]);
        handle.setAttribute("aria-description", names[name].hint);
      });
      const number = control.querySelector(".widget-readout");
      number?.setAttribute("role", "textbox");
      number?.setAttribute("aria-label", `${name}, as a number`);
    }
    box.querySelector(".loco-status")?.setAttribute("aria-live", "polite");
  }

  const changes = new MutationObserver(() => attach());
  let box = null;
  function attach() {
    if (box === null) {
      box = el.closest(".loco-explore");
      if (box === null) return;
      changes.observe(box, { childList: true, subtree: true });
    }
    nameAll(box);
  }
  // The element gets its size when it gets its place in the page.
  const placed = new ResizeObserver(() => attach());
  placed.observe(el);
  return () => {
    changes.disconnect();
    placed.disconnect();
  };
}

// After a page of JupyterLab was loaded again, the kernel reaches the widgets only, no output: the
// twin in the notebook, which is what is saved, is kept here. Elsewhere there is no such notebook.
function initialize({ model }) {
  function keep() {
    const notebook = model.widget_manager?.context?.model;
    for (const cell of notebook?.cells ?? []) {
      const outputs = cell.outputs;
      for (let i = 0; i < (outputs?.length ?? 0); i += 1) keepOutput(outputs, i, model.get("twin"));
    }
  }

  function keepOutput(outputs, i, twin) {
    const output = outputs.get(i).toJSON();
    const html = [output.data?.["text/html"] ?? ""].flat().join("");
    const isOurs = html.includes(`class="${model.get("name")}-twin"`);
    if (!isOurs || !twin || html === twin) return;
    outputs.set(i, { ...output, data: { ...output.data, "text/html": twin } });
  }

  model.on("change:twin", keep);
  keep();
  return () => model.off("change:twin", keep);
}

export default { initialize, render };
