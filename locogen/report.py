"""Results and executed notebooks → pages: an index of all runs, and each run with and without its code.

`build` needs only what a run has left in its folder: `notebook.ipynb`, `pictures.csv`, `effects.csv` and
`result.json`, or `error.json` where it failed. It can be repeated at any time and gives the same pages.
"""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cleaning import arrange, clean
from .errors import LocogenError
from .pages import Html, facts, figure, html, link, page, shrink, table
from .plan import Window
from .plots import figure_size, plot_effect
from .tables import describe, effect_matrix, findings, interval, missing, number, precision

if TYPE_CHECKING:
    import pandas as pd

LARGE = 1_500_000  # bytes: a page above this is told about
OTHER_TABLES = (
    "evaluation", "summary", "grid", "neurons", "changes", "localizers", "agreement", "sides", "trace",
)  # fmt: skip
LIVE = {"application/vnd.jupyter.widget-view+json", "application/javascript"}  # dead in a saved page
TITLE = "Which layers carry what the model knows"
EXPLANATION = """For each concept, a few neighboring layers of the model (a window) hear a prompt without it,
while all other layers hear the prompt that holds it. What this changes in the CLIP-score, against pictures
for which every layer hears the prompt, is the window's effect. It is signed so that positive means that the
window carries the concept; intervals are 95 %. The ceiling is the effect when every layer hears the prompt
without it."""


@dataclass(frozen=True)
class Finished:
    """One run's folder as it was found: no `effects` and `carriers` where it failed, or was no localization."""

    folder: Path
    facts: Mapping[str, Any]
    error: str = ""
    effects: Any = None  # the effects table, a DataFrame
    carriers: Mapping[str, Window] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the run calls itself, or its folder's name."""
        return str(self.facts.get("title") or self.folder.name)


def build(folder: Path | str) -> Path:
    """Make the pages of all runs in a results folder again, from what the runs left there; returns the index.

    A run that failed, or left something unreadable, is shown as failed with its error, and never hides the
    others. Warns of figures without a description (alt text) and of pages above 1.5 MB. Raises `LocogenError`
    where there is no run at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LocogenError(f"there is no folder {folder}: make results first, with `python -m locogen run`")
    places = sorted(place for place in folder.iterdir() if place.is_dir() and not place.is_symlink())
    runs = sorted((read_run(place) for place in places if _is_run(place)), key=_rank)
    if not runs:
        raise LocogenError(f"{folder} holds no run: make some first, with `python -m locogen run`")
    for run in runs:
        _write_pages(run)
    return _write(folder / "index.html", index_page(runs))


def read_run(folder: Path) -> Finished:
    """What a run left; one whose files are missing or unreadable comes back as failed."""
    if not (folder / "result.json").exists():
        if not (folder / "error.json").exists():
            return Finished(folder, {}, "unfinished: it was stopped, or is still running")
        told = _read_json(folder / "error.json")
        cell = told.get("cell")
        place = f" (cell {cell})" if cell is not None else ""
        return Finished(folder, told, str(told.get("error") or "it says nothing about its error") + place)
    told = _read_json(folder / "result.json")
    if "error" in told:
        return Finished(folder, {}, str(told["error"]))
    if not told.get("carriers") and not (folder / "effects.csv").exists():
        return Finished(folder, told)  # a notebook that localizes nothing: its finding is all there is to list
    try:
        effects = _read_effects(folder / "effects.csv")
        carriers = {str(c["concept"]): _window(c) for c in told["carriers"]}
        findings(effects, carriers)
    except (OSError, ValueError, KeyError, TypeError, LocogenError) as error:
        return Finished(folder, told, f"its results cannot be read: {type(error).__name__}: {error}")
    return Finished(folder, told, "", effects, carriers)


def index_page(runs: Sequence[Finished]) -> str:
    """The page over all runs: one heatmap on one scale, one table."""
    good = [run for run in runs if run.effects is not None]
    more = [run for run in runs if run.effects is None and not run.error]
    parts = [f"<h1>{html(TITLE)}</h1>", f"<p>{html(EXPLANATION)}</p>"]
    if good:
        parts.append(_heatmap(good))
    headings = ["concept", "kind", "model", "carrier", "effect [95 %]", "of the ceiling", "verdict", "data"]
    beside = any(run.facts.get("published") is not None for run in runs)
    headings[4:4] = ["published start"] * beside
    lines = [line for run in runs if run not in more for line in _lines(run, beside=beside)]
    if lines:
        parts.append(table(headings, lines, caption="Runs: each concept opens its page; the tables behind it are CSV"))
    if more:
        told = [(link(f"{r.folder.name}/index.html", r.title), r.facts.get("finding") or "–", _data(r)) for r in more]
        parts.append(table(("what else was done", "finding", "data"), told, caption="Edits and other notebooks"))
    failed = sum(bool(run.error) for run in runs)
    parts.append(f'<footer class="soft"><p>{len(runs)} runs, {failed} failed or unfinished.</p></footer>')
    return page(TITLE, "\n".join(parts))


def run_page(run: Finished, notebook: Any, *, code: bool) -> str:
    """One run's notebook without its code, or with it (figures are then links to the page without)."""
    body = _as_html(run, notebook, code=code) if notebook is not None else ""
    top = f"<h1>{html(run.title)}</h1>\n"
    if run.error:
        top += f'<p class="finding failed"><strong class="bad">Failed:</strong> {html(run.error)}</p>'
    else:
        finding = run.facts.get("finding") or ("" if run.effects is None else describe(run.effects, run.carriers))
        top += f'<p class="finding">{html(finding)}</p>'
    other = link("index.html", "Without the code") if code else link("code.html", "With the code")
    data = {"notebook.ipynb": "Notebook", "pictures.csv": "Pictures (CSV)", "effects.csv": "Effects (CSV)"}
    data |= {f"{name}.csv": f"{name.capitalize()} (CSV)" for name in OTHER_TABLES}
    data |= {"edit.safetensors": "Edit", "lora.safetensors": "LoRA"}
    there = [link(name, text) for name, text in data.items() if (run.folder / name).exists()]
    nav = [link("../index.html", "All runs"), *([other] if body else []), *there]
    return page(run.title, f"{top}\n{body}\n{_footer(run)}", navigation=nav)


def _write_pages(run: Finished) -> None:
    try:
        notebook = _read_notebook(run.folder / "notebook.ipynb")
        pages = {"index.html": run_page(run, notebook, code=False)}
        if notebook is not None:
            pages["code.html"] = run_page(run, notebook, code=True)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = f"the notebook cannot be read: {type(error).__name__}: {error}"
        warnings.warn(f"{run.folder.name}: {reason}", stacklevel=3)
        pages = {"index.html": run_page(replace(run, error=run.error or reason), None, code=False)}
    for name, text in pages.items():
        _write(run.folder / name, text)
        if len(text) > LARGE:
            warnings.warn(f"{run.folder / name} is large: {len(text) / 1e6:.1f} MB", stacklevel=3)


def _read_notebook(path: Path) -> Any:
    """The notebook with what a page shows of its outputs; None where a run failed before it had one."""
    import nbformat

    if not path.exists():
        return None
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _output(output)) is not None]
    return notebook


def _as_html(run: Finished, notebook: Any, *, code: bool) -> Html:
    """The notebook as HTML, cleaned and fitted to a page; warns of figures without a description."""
    fragment, _ = _exporter(code).from_notebook_node(notebook)
    body, silent = arrange(fragment, figures_at="index.html" if code else "")
    for label in [] if code else silent:
        remedy = 'display it with metadata={"image/png": {"alt": "what it shows"}}'
        warnings.warn(f"{run.folder.name}: {label} has no description: {remedy}", stacklevel=5)
    return Html(body)


@cache
def _exporter(code: bool) -> Any:
    from nbconvert.exporters import HTMLExporter

    quiet = logging.getLogger("locogen.nbconvert")
    quiet.setLevel(logging.ERROR)  # what it warns of is told better here
    return HTMLExporter(
        template_name="basic", sanitize_html=True, filters={"clean_html": clean}, exclude_input=not code,
        exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True, log=quiet,
        mathjax_url="", require_js_url="", jquery_url="",
    )  # fmt: skip


def _output(output: Any) -> Any:
    """An output as the page shows it: no standard error, nothing live, the last state of progress lines."""
    if output.output_type == "stream":
        if output.name == "stderr":
            return None
        output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n"))
    data = output.get("data")
    if data is not None:
        if LIVE & set(data):
            return None
        if "image/png" in data:
            data["image/png"] = shrink(data["image/png"])
    return output


def _heatmap(runs: Sequence[Finished]) -> Html:
    """All concepts of all runs on one scale, as a picture with the findings for a description."""
    import matplotlib.style
    from matplotlib.figure import Figure

    effects, carriers = _together(runs)
    matrix = effect_matrix(effects)
    size = figure_size(matrix)
    with matplotlib.style.context("default"):
        drawing = Figure(figsize=size, dpi=160, layout="constrained")
        plot_effect(effects, carriers=carriers, ax=drawing.add_subplot())
        drawing.savefig(png := io.BytesIO(), format="png")
    alt = f"Heatmap of the effect of {matrix.shape[1]} windows on {len(matrix)} concepts. "
    return figure(png.getvalue(), alt + describe(effects, carriers, short=len(matrix) > 2), inches=size[0])


def _together(runs: Sequence[Finished]) -> tuple[pd.DataFrame, dict[str, Window]]:
    """One effects table over all runs; a concept that several have is named with its model, or its folder."""
    import pandas as pd

    pairs = [(run, concept) for run in runs for concept in _concepts(run)]
    often = Counter(concept for _, concept in pairs)
    same = Counter((concept, run.facts.get("model")) for run, concept in pairs)
    parts, carriers = [], {}
    for run, concept in pairs:
        model = run.facts.get("model")
        name = concept if often[concept] == 1 else f"{concept}, {model}"
        name = name if same[concept, model] == 1 else f"{concept}, {run.folder.name}"
        rows: Any = run.effects
        parts.append(rows[rows["concept"] == concept].assign(concept=name))
        if concept in run.carriers:
            carriers[name] = run.carriers[concept]
    return pd.concat(parts, ignore_index=True), carriers


def _lines(run: Finished, *, beside: bool) -> list[list[Any]]:
    """The rows of one run in the index's table, one a concept; with `beside`, where its authors found it is told."""
    published = run.facts.get("published")
    published = [("number", "–" if published is None else f"layer {published}")] * beside
    slug, model, csv = run.folder.name, run.facts.get("model", "–"), _data(run)
    if run.error:
        name = ", ".join(map(str, run.facts.get("concepts") or [slug]))
        verdict = Html(f'<strong class="bad">failed</strong>: {html(run.error)}')
        return [[link(f"{slug}/index.html", name), "–", model, "–", *published, "–", "–", ("verdict", verdict), csv]]
    lines = []
    for row in findings(run.effects, run.carriers):
        numbers: list[Any] = ["–", "–", "–"]
        verdict = "<strong>no single window</strong>" if row["judged"] else "not judged"
        if row["start"] is not None:
            digits = precision(row["estimate"])
            share = "–" if missing(row["share"]) else f"{number(100 * row['share'], 0)} %"
            effect = number(row["estimate"], digits) + interval(row, digits)
            numbers = [("number", cell) for cell in (_layers(row["start"], row["width"]), effect, share)]
            open_lead = "not established" in str(row["reason"])
            verdict = "<strong>lead open</strong>" if open_lead else '<strong class="good">localized</strong>'
        verdict = Html(verdict + (f": {html(row['reason'])}" if row["reason"] else ""))
        name = link(f"{slug}/index.html", row["label"])
        place, *amounts = numbers
        lines.append([name, row["kind"] or "–", model, place, *published, *amounts, ("verdict", verdict), csv])
    return lines


def _data(run: Finished) -> Html:
    """Links to the tables that a run left."""
    names = [name for name in ("pictures", "effects", *OTHER_TABLES) if (run.folder / f"{name}.csv").exists()]
    return Html(" ".join(link(f"{run.folder.name}/{name}.csv", name) for name in names) or "–")


def _layers(start: int, width: int) -> str:
    return f"layer {start}" if width == 1 else f"layers {start}–{start + width - 1}"


def _footer(run: Finished) -> Html:
    told = run.facts
    general = {name: told[name] for name in ("model", "concepts", "kind", "pictures", "finished") if name in told}
    if isinstance(seconds := told.get("seconds"), int | float):
        general["time"] = f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    groups = {"Run": general}
    groups |= {name.capitalize(): told.get(name) or {} for name in ("settings", "parameters", "versions")}
    return Html(f"<footer>\n<h2>How this was made</h2>\n{facts(groups)}\n</footer>")


def _concepts(run: Finished) -> list[str]:
    rows: Any = run.effects
    return [str(name) for name in rows.loc[rows["axis"] == "layer", "concept"].unique()]


def _window(told: Mapping[str, Any]) -> Window:
    start = told.get("start")
    reason = str(told.get("reason") or "")
    return Window(None if start is None else int(start), int(told["width"]), reason)


def _rank(run: Finished) -> tuple[bool, int, str, str]:
    """Failed runs last; styles, objects, facts; then in the order in which they ended."""
    kind = str(run.facts.get("kind"))
    kinds = ("style", "object", "fact")
    place = kinds.index(kind) if kind in kinds else len(kinds)
    return bool(run.error), place, str(run.facts.get("finished", "")), run.folder.name


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("result.json", "error.json", "notebook.ipynb"))


def _read_effects(path: Path) -> pd.DataFrame:
    """Only an empty cell is missing: a concept may be called "NA" or "1984"."""
    import pandas as pd

    text: Any = dict.fromkeys(("method", "concept", "axis", "kind", "prompts"), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""], encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"error": f"{path.name} cannot be read: {error}"}
    return told if isinstance(told, dict) else {"error": f"{path.name} does not hold an object"}


def _write(path: Path, text: str) -> Path:
    """Write a page whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
    return path
