"""Results and executed notebooks → pages: an index, a page for each model and concept, and each run with its notebook.

`build` needs only what runs have left in their folders (`locogen.pages.results`). It can be repeated at any time
and gives the same pages; those of a run are made again only where the run, its place or locogen itself has changed.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from locogen.files import ENCODING, CannotWrite, write_whole
from locogen.pages.cleaning import arrange, clean
from locogen.pages.html import Html, facts, html, link, page, shrink, table
from locogen.pages.index import TABLES, comparison_page, data_links, index_page
from locogen.pages.provenance import duration, study_page
from locogen.pages.results import (
    Entry,
    Finished,
    addresses,
    damaged,
    entries,
    read_runs,
    read_study_facts,
    read_table,
    reason_of,
    shown_pictures,
)  # fmt: skip
from locogen.views.tables import describe, missing

LARGE = 1_500_000  # bytes: a page above this is told about
MOST_ROWS = 250  # of a table that is shown, not only linked
SHOWN = {  # columns of the tables behind the figures of a run, and how they are ordered
    "effects": ["concept", "axis", "position", "width", "estimate", "low", "high", "share", "n"],
}
LIVE = {
    "application/vnd.jupyter.widget-view+json",
    "application/javascript",
}  # dead in a saved page
FILES = {
    "notebook.ipynb": "Notebook",
    **{f"{name}.csv": f"{name.capitalize()} (CSV)" for name in TABLES},
    "edit.safetensors": "Edit",
    "lora.safetensors": "LoRA",
}


def build(folder: Path | str) -> Path:
    """Make the pages of all runs in a results folder again, from what the runs left there; returns the index.

    A run that failed, or left something unreadable, is shown as failed with its error, and never hides the
    others. Warns of figures without a description (alt text) and of pages above 1.5 MB.

    Args:
        folder: The results folder of a study.

    Returns:
        The index page.

    Raises:
        LocogenError: There is no run at all, or the folder takes no files (`CannotWrite`).
    """
    folder = Path(folder)
    runs = read_runs(folder)
    try:
        return _build(folder, runs)
    except CannotWrite:
        raise
    except Exception:
        # Some run has what nobody thought of. It is found by making each one's part of the pages alone.
        proved = [_proved(run) for run in runs]
        if proved == runs:
            raise
        return _build(folder, proved)


def _proved(run: Finished) -> Finished:
    """The run as it is, or as a damaged one where its part of the pages over many runs cannot be made."""
    try:
        found, models, concepts = gather([run])
        index_page([run], found, models, concepts)
        study_page([run], name="x")
        comparison_page("x", found, by="concept", others=concepts)
        comparison_page("x", found, by="model", others=models)
    except CannotWrite:
        raise
    except Exception as error:
        return damaged(run.folder, run.facts, error)
    return run


def _build(folder: Path, runs: Sequence[Finished]) -> Path:
    found, models, concepts = gather(runs)
    marks = {run.folder: _mark(run) for run in runs}
    for run in runs:
        own = [entry for entry in found if entry.run is run]
        nav = [link(f"../{models[run.model]}", run.model)] if own else []
        nav += [link(f"../{concepts[entry.concept]}", entry.concept) for entry in own]
        _write_pages(run, list(dict.fromkeys(nav)), marks[run.folder])
    for name, address in models.items():
        own = [entry for entry in found if entry.run.model == name]
        _compare(folder / address, f"The model {name}", own, concepts, marks, by="concept")
    for name, address in concepts.items():
        own = [entry for entry in found if entry.concept == name]
        _compare(folder / address, f"The concept {name}", own, models, marks, by="model")
    title = read_study_facts(folder).get("title", "")
    _write(folder / "study.html", study_page(runs, name=folder.resolve().name, title=title))
    _forget(folder, {*models.values(), *concepts.values()})
    return _write(folder / "index.html", index_page(runs, found, models, concepts, title=title))


def gather(runs: Sequence[Finished]) -> tuple[list[Entry], dict[str, str], dict[str, str]]:
    """What runs say: their entries, and the addresses of the models' and concepts' pages."""
    found = [
        replace(entry, pictures=shown_pictures(entry) if entry.row else {})
        for entry in entries(runs)
    ]
    models = addresses("model", list(dict.fromkeys(entry.run.model for entry in found)))
    concepts = addresses("concept", list(dict.fromkeys(entry.concept for entry in found)))
    return found, models, concepts


def run_page(
    run: Finished, notebook: Any, *, code: bool, nav: Sequence[Html] = (), source: str = ""
) -> str:
    """One run's notebook without its code, or with it (figures are then links to the page without)."""
    body = _as_html(run, notebook, code=code) if notebook is not None else ""
    top = f"<h1>{html(run.title)}</h1>\n"
    if run.error:
        cell = (
            f" ({link(f'code.html#cell-id-{run.cell}', f'cell {run.cell}')})"
            if run.cell is not None and body
            else ""
        )
        top += f'<p class="finding failed"><strong class="bad">Failed:</strong> {html(run.error)}{cell}</p>'
    else:
        finding = run.facts.get("finding") or (
            "" if run.effects is None else describe(run.effects, run.carriers)
        )
        top += f'<p class="finding">{html(finding)}</p>'
    other = link("index.html", "Without the code") if code else link("code.html", "With the code")
    there = [link(name, text) for name, text in FILES.items() if (run.folder / name).exists()]
    links = [link("../index.html", "All runs"), *nav, *([other] if body else []), *there]
    behind = "" if code else _tables(run)
    text = f"{top}\n{body}\n{behind}{_footer(run)}"
    return page(run.title, text, navigation=links, inline=True, source=source)


def _compare(
    path: Path,
    title: str,
    own: Sequence[Entry],
    others: Mapping[str, str],
    marks: Mapping[Path, str],
    *,
    by: str,
) -> None:
    """Write the page of one model (runs told apart by concept) or of one concept (by model), where it has changed."""
    linked = {
        name: others[name]
        for name in dict.fromkeys(e.concept if by == "concept" else e.run.model for e in own)
    }
    told = [
        (entry.concept, entry.name, list(entry.pictures), marks[entry.run.folder]) for entry in own
    ]
    source = _hashed(title, linked, told)
    if not _is_made([path], source):
        _write(path, comparison_page(title, own, by=by, others=linked, source=source))


def _forget(folder: Path, made: Collection[str]) -> None:
    """Take away the pages of models and concepts that are no longer there; ours only."""
    for path in folder.glob("*.html"):
        if (
            re.fullmatch(r"(model|concept)-.+\.html", path.name)
            and path.name not in made
            and path.is_file()
        ):
            with path.open(encoding="utf-8", errors="replace") as stream:
                if '<meta name="generator" content="locogen">' in stream.read(2000):
                    path.unlink()


def _write_pages(run: Finished, nav: Sequence[Html], mark: str) -> None:
    source = _hashed(mark, nav)
    names = ["index.html", *(["code.html"] if (run.folder / "notebook.ipynb").exists() else [])]
    if _is_made((run.folder / name for name in names), source):
        return
    try:
        notebook = _read_notebook(run.folder / "notebook.ipynb")
        pages = {"index.html": run_page(run, notebook, code=False, nav=nav, source=source)}
        if notebook is not None:
            pages["code.html"] = run_page(run, notebook, code=True, nav=nav, source=source)
    except (
        Exception
    ) as error:  # of one notebook; nbformat, nbconvert and Pillow raise what they like
        reason = f"the notebook cannot be read: {reason_of(error)}"
        warnings.warn(f"{run.folder.name}: {reason}", stacklevel=3)
        pages = {
            "index.html": run_page(
                replace(run, error=run.error or reason), None, code=False, nav=nav
            )
        }
    for name, text in pages.items():
        try:
            _write(run.folder / name, text)
        except OSError as error:  # such as a folder of that name
            warnings.warn(
                f"{run.folder.name}: {name} cannot be written: {reason_of(error)}", stacklevel=3
            )
        if len(text) > LARGE:
            warnings.warn(f"{run.folder / name} is large: {len(text) / 1e6:.1f} MB", stacklevel=3)


def _mark(run: Finished) -> str:
    """A hash of all that a run has left, and of the code that makes pages."""
    told = [_code(), run.error]
    for name in ("result.json", "error.json", *FILES):
        told += [name, _content_hash(run.folder / name)]
    return _hashed(told)


def _content_hash(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:  # it is not there, or not to be read
        return str(error.strerror)


def _hashed(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """A hash of the files that pages are made by: these modules, their templates, and the views they show."""
    here = Path(__file__).parent
    files = [*sorted(here.rglob("*.*")), *sorted((here.parent / "views").glob("*.py"))]
    return hashlib.sha256(
        b"".join(file.read_bytes() for file in files if file.suffix != ".pyc")
    ).hexdigest()


def _is_made(pages: Iterable[Path], source: str) -> bool:
    """Whether the pages are there and were made of just this."""
    for path in pages:
        if not path.is_file():
            return False
        with path.open(encoding="utf-8", errors="replace") as stream:
            if f'<meta name="source" content="{source}">' not in stream.read(2000):
                return False
    return True


def _read_notebook(path: Path) -> Any:
    """The notebook with what a page shows of its outputs; None where a run failed before it had one."""
    import nbformat

    if not path.exists():
        return None
    notebook = nbformat.reads(path.read_text(encoding=ENCODING), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if cell.get("execution_count") is not None:
                cell["id"] = str(
                    cell["execution_count"]
                )  # an address for the number that errors are told with
            cell.outputs = [
                kept for output in cell.outputs if (kept := _output(output)) is not None
            ]
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
        output.text = "\n".join(
            line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")
        )
    data = output.get("data")
    if data is not None:
        if LIVE & set(data):
            return None
        if "image/png" in data:
            data["image/png"] = shrink(data["image/png"])
    return output


def _tables(run: Finished) -> str:
    """The numbers behind the run's figures, in elements that open; long tables are linked only."""
    parts = []
    for name in data_links(run):
        if name == "pictures":
            continue
        try:
            rows: Any = read_table(run.folder / f"{name}.csv")
        except Exception:  # pandas raises what it likes
            continue
        if not len(rows) or len(rows) > MOST_ROWS:
            continue
        columns = [column for column in SHOWN.get(name) or list(rows.columns) if column in rows]
        lines = [
            [_number(value) for value in line] for line in rows[columns].itertuples(index=False)
        ]
        shown = table([str(column) for column in columns], lines, caption=f"{name}.csv").replace(
            ' class="cards"', ""
        )
        parts.append(
            f"<details><summary>The numbers behind the figures: {name}</summary>{shown}</details>"
        )
    return "\n".join(parts)


def _number(value: Any) -> Any:
    if missing(value):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else value


def _footer(run: Finished) -> Html:
    told = run.facts
    general = {
        name: told[name]
        for name in ("model", "concepts", "kind", "pictures", "finished")
        if name in told
    }
    if isinstance(told.get("seconds"), int | float):
        general["time"] = duration(told["seconds"])
    groups = {"Run": general}
    groups |= {
        name.capitalize(): told.get(name) or {} for name in ("settings", "parameters", "versions")
    }
    more = link("../study.html", "How all runs were made, and how to make them again")
    return Html(f"<footer>\n<h2>How this was made</h2>\n{facts(groups)}\n<p>{more}</p>\n</footer>")


def _write(path: Path, text: str) -> Path:
    """Write a page whole or not at all."""
    write_whole(path, text.encode("utf-8", errors="replace"))
    return path
