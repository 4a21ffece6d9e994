"use strict";
// Windows to choose, pictures to enlarge, edits to slide over. The page says what was found without this script.
(() => {
  const block = document.getElementById("page.data");
  const data = JSON.parse(block.textContent);
  const large = document.getElementById("page.large");
  const opened = new WeakMap();  // button of a picture → what it shows

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    Object.assign(element, properties);
    element.append(...children);
    return element;
  }
  const source = place => data.pictures[place].source;

  // --- one picture, or two with a slider ---

  function stacked(item) {
    const after = make("img", { src: source(item.after), alt: `After: ${item.words}` });
    const before = make("img", { src: source(item.before), alt: `Before: ${item.words}`, className: "before" });
    return make("span", { className: "compare" }, after, before);
  }

  function slider(stack, item) {
    const range = make("input", { type: "range", min: 0, max: 100, value: 50 });
    range.setAttribute("aria-label", `Before and after: ${item.words}`);
    const slide = () => {
      stack.querySelector(".before").style.clipPath = `inset(0 ${100 - range.value}% 0 0)`;
      range.setAttribute("aria-valuetext", `${range.value} % before, ${100 - range.value} % after`);
    };
    range.addEventListener("input", slide);
    slide();
    return make("span", { className: "slide" }, range,
      make("span", { className: "ends" }, make("span", { textContent: "before" }), make("span", { textContent: "after" })));
  }

  function frame() {
    const image = make("img", { alt: "" });
    const button = make("button", { type: "button", className: "enlarge" }, image);
    button.addEventListener("click", () => enlarge(button));
    const caption = make("figcaption");
    const figure = make("figure", { className: "frame" }, button, caption);
    figure.show = (title, picture, words) => {
      button.hidden = !picture;
      caption.replaceChildren(make("strong", { textContent: title }), picture ? ` ${picture[1]}` : " not made");
      if (!picture) return;
      image.src = source(picture[0]);
      image.alt = words;
      opened.set(button, { place: picture[0], words: `${words}; ${picture[1]}` });
    };
    return figure;
  }

  function pair(item) {
    const words = `${item.prompt}, seed ${item.seed}`;
    const both = { ...item, words };
    const stack = stacked(both);
    const button = make("button", { type: "button", className: "enlarge" }, stack);
    button.addEventListener("click", () => enlarge(button));
    opened.set(button, { ...both, words: `${words}; ${item.words}` });
    const caption = make("figcaption", {}, make("strong", { textContent: words }), ` ${item.words}`);
    return make("figure", { className: "frame" }, button, slider(stack, both), caption);
  }

  // --- a picture, large ---

  let current = null;

  function enlarge(button) {
    current = button;
    const item = opened.get(button);
    const stage = large.querySelector(".stage");
    if ("before" in item) {
      const stack = stacked(item);
      stage.replaceChildren(stack, slider(stack, item));
    } else {
      const image = make("img", { src: source(item.place), alt: item.words });
      stage.replaceChildren(image);
      sharpen(image, item.place);
    }
    document.getElementById("page.large.title").textContent = item.words;
    const file = data.pictures["before" in item ? item.after : item.place].file;
    const link = document.getElementById("page.large.file");
    link.hidden = !file;
    if (file) link.href = file;
    if (!large.open) large.showModal();
  }

  // The full picture, where it is beside the page; until it is there, and without it, the small one.
  function sharpen(image, place) {
    const file = data.pictures[place].file;
    if (!file) return;
    const full = new Image();
    full.addEventListener("load", () => { image.src = full.src; });
    full.src = file;
  }

  function step(by) {
    const buttons = [...document.querySelectorAll("button.enlarge:not([hidden])")];
    enlarge(buttons[(buttons.indexOf(current) + by + buttons.length) % buttons.length]);
  }

  large.addEventListener("click", event => {
    if (event.target === large || "close" in event.target.dataset) large.close();
    else if (event.target.dataset.step) step(Number(event.target.dataset.step));
  });
  large.addEventListener("keydown", event => {
    if (event.target.type === "range") return;
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
  });
  large.addEventListener("close", () => { if (current) current.focus(); });

  // --- windows ---

  const section = document.getElementById("page.windows");
  const sweeps = section ? [...section.querySelectorAll(".sweep")].map((element, place) => sweep(element, data.sweeps[place])) : [];

  function sweep(element, facts) {
    const cells = [...element.querySelectorAll(".cells button")];
    const readout = element.querySelector(".readout");
    const hint = readout.textContent;
    const heading = element.querySelector(".shown-window");
    const roles = facts.roles.map(([role, words]) => ({ role, words }));
    const rows = facts.samples.map(sample => {
      const frames = roles.map(() => frame());
      const title = make("p", {}, make("strong", { textContent: sample.prompt }), ` seed ${sample.seed}`);
      element.querySelector(".samples").append(make("div", { className: "sample" }, title, make("div", { className: "frames" }, ...frames)));
      return { sample, frames };
    });

    function choose(start) {
      const window = facts.windows.find(each => each.start === start);
      if (!window) return false;
      for (const cell of cells) {
        const isChosen = Number(cell.dataset.start) === start;
        cell.setAttribute("aria-checked", isChosen);
        cell.tabIndex = isChosen ? 0 : -1;
      }
      const lines = window.lines.flatMap(([term, value]) => [make("dt", { textContent: term }), make("dd", { textContent: value })]);
      heading.replaceChildren(
        make("h3", { textContent: `${window.label} ${window.note}`.trim() }), make("dl", {}, ...lines));
      for (const { sample, frames } of rows) {
        roles.forEach(({ role, words }, place) => {
          const of = sample.pictures[role];
          const picture = of && !Array.isArray(of) ? of[start] : of;
          frames[place].show(words, picture, `${sample.prompt}, seed ${sample.seed}, ${describe(role, window.label, sample.target)}`);
        });
      }
      return true;
    }

    function describe(role, label, target) {
      return {
        baseline: "the prompt in every layer",
        window: `“${target}” in ${label} only`,
        insert: `the prompt in ${label} only, “${target}” in all others`,
        ceiling: `“${target}” in every layer`,
      }[role];
    }

    function pick(start) {
      if (choose(start)) write(facts.concept, start);
    }

    element.querySelector(".cells").addEventListener("keydown", event => {
      const place = cells.indexOf(event.target);
      const next = { ArrowLeft: place - 1, ArrowUp: place - 1, ArrowRight: place + 1, ArrowDown: place + 1, Home: 0, End: cells.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      const cell = cells[(next + cells.length) % cells.length];
      pick(Number(cell.dataset.start));
      cell.focus();
    });
    for (const cell of cells) {
      cell.addEventListener("click", () => pick(Number(cell.dataset.start)));
      for (const kind of ["pointerenter", "focus"]) cell.addEventListener(kind, () => { readout.textContent = cell.getAttribute("aria-label"); });
      for (const kind of ["pointerleave", "blur"]) cell.addEventListener(kind, () => { readout.textContent = hint; });
    }
    return { element, facts, choose, first: Number(element.querySelector(".cells").dataset.first) };
  }

  // --- the address: #window=12, or #concept=neon&window=12 where there are several ---

  function write(concept, start) {
    const values = new URLSearchParams(sweeps.length > 1 ? { concept, window: start } : { window: start });
    history.replaceState(null, "", `#${values}`);
  }

  function follow() {
    const values = new URLSearchParams(location.hash.slice(1));
    if (!values.has("window")) return;
    const asked = values.get("concept");
    const one = sweeps.find(each => asked === null || each.facts.concept === asked);
    if (one && one.choose(Number(values.get("window")))) one.element.scrollIntoView();
  }

  // --- edits ---

  const edits = document.getElementById("page.edits");
  const arm = document.getElementById("page.arm");

  function showArm() {
    const groups = new Map();
    for (const each of data.arms[arm.value].pairs) groups.set(each.group, [...(groups.get(each.group) || []), each]);
    const sections = [...groups].flatMap(([group, pairs]) => [
      make("h3", { textContent: group }), make("div", { className: "frames" }, ...pairs.map(pair))]);
    edits.querySelector(".pairs").replaceChildren(...sections);
  }

  if (section) section.hidden = false;
  for (const each of sweeps) each.choose(each.first);
  if (edits) {
    edits.hidden = false;
    arm.addEventListener("change", showArm);
    showArm();
  }
  for (const each of document.querySelectorAll("[data-scripted]")) each.hidden = false;
  window.addEventListener("hashchange", follow);
  follow();
})();
