"""A results folder → pages: the index, a page for each model and concept, and each run's own.

`build` needs only what runs left in their folders (`locogen.pages.results`). It can be repeated at
any time and gives the same pages; those of a run are made again only if the run, its place or the
code that makes pages has changed.
"""

from __future__ import annotations

import functools
import hashlib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from locogen.errors import LocogenError
from locogen.files import CannotWrite, replacing, write_whole, writing
from locogen.pages.cleaning import headings
from locogen.pages.entries import Entry, addresses, entries as entries_of
from locogen.pages.exploring.album import PAGE, page_limit
from locogen.pages.exploring.explorable import Explorable, explorable
from locogen.pages.html import page
from locogen.pages.index import comparison_page, index_page, show_entry
from locogen.pages.notebook import notebook_html, read_notebook
from locogen.pages.pictures import shown_pictures
from locogen.pages.provenance import fact_groups, moment, study_page, time_spent
from locogen.pages.results import (
    TABLES,
    Finished,
    damaged,
    pick,
    read_runs,
    read_study_facts,
    read_table,
    reason_of,
)
from locogen.views.tables import describe, missing

MOST_ROWS = 250  # of a table; a longer one is only linked

# Columns to show of the tables behind a run's figures; of others, all.
SHOWN_COLUMNS = {
    "effects": ["concept", "axis", "position", "width", "estimate", "low", "high", "share", "n"],
}
# What a run's page links to, as far as the run left it: file → words.
FILES = {
    "notebook.ipynb": "Notebook",
    **{f"{name}.csv": f"{name.capitalize()} (CSV)" for name in TABLES},
    "edit.safetensors": "Edit",
    "lora.safetensors": "LoRA",
}
# Ids of a run's page, and their words in its table of contents. With a dot: no id of a notebook has
# one after cleaning.
CONTENTS = {
    "page.meaning": "What this means",
    "page.windows": "Look at each window",
    "page.edits": "Look at the pictures before and after",
    "page.maps": "What gradients propose",
    "page.words": "The words of this page",
    "page.how": "How this was made",
}
SCRIPTED = ("page.windows", "page.edits")  # those that are there only if the page's script runs
GENERATOR = '<meta name="generator" content="locogen">'
HEAD = 2000  # characters of a page in which its meta elements stand


@dataclass(frozen=True)
class ShownTable:
    """A table of a run, as its page shows it."""

    name: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]


def build(folder: Path | str) -> Path:
    """Make the pages of all runs in a results folder again, from what the runs left there.

    A run that failed, or left something unreadable, is shown as failed with its error, and never
    hides the others. Warns of figures without a description (alt text) and of pages above 1.5 MB.

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
        # Some run has something that no check foresees. To find it, the pages are made of each
        # run by itself. If all of them succeed, the fault is not in a run.
        proved = [_proved(run) for run in runs]
        if proved == runs:
            raise
        return _build(folder, proved)


def _proved(run: Finished) -> Finished:
    """The run itself, or a damaged one if it cannot be shown on the pages over many runs."""
    try:
        entries, models, concepts = gather([run])
        index_page([run], entries, models, concepts)
        study_page([run], name="x")
        comparison_page("x", entries, by="concept", others=concepts)
        comparison_page("x", entries, by="model", others=models)
    except CannotWrite:
        raise
    except Exception as error:
        return damaged(run.folder, run.facts, error)
    return run


def _build(folder: Path, runs: Sequence[Finished]) -> Path:
    entries, models, concepts = gather(runs)
    digests = {run.folder: _digest_of_run(run) for run in runs}
    for run in runs:
        in_run = [entry for entry in entries if entry.run is run]
        links = _links_up(in_run, models, concepts)
        _write_run(run, in_run, links, digests[run.folder])

    # Entries of a model differ by concept, those of a concept by model.
    _write_comparisons(folder, entries, "model", models, concepts, digests)
    _write_comparisons(folder, entries, "concept", concepts, models, digests)

    title = read_study_facts(folder).get("title", "")
    _write(folder / "study.html", study_page(runs, name=folder.resolve().name, title=title))
    _remove_stale(folder, {*models.values(), *concepts.values()})
    return _write(folder / "index.html", index_page(runs, entries, models, concepts, title=title))


def gather(runs: Sequence[Finished]) -> tuple[list[Entry], dict[str, str], dict[str, str]]:
    """What the pages over many runs are made from.

    Args:
        runs: All runs of a results folder.

    Returns:
        Their entries with pictures, and the files of the models' and the concepts' pages by name.
    """
    entries = []
    for entry in entries_of(runs):
        pictures = shown_pictures(entry) if entry.row else {}
        entries.append(replace(entry, pictures=pictures))
    models = dict.fromkeys(entry.run.model for entry in entries)
    concepts = dict.fromkeys(entry.concept for entry in entries)
    return entries, addresses("model", list(models)), addresses("concept", list(concepts))


def write_zip(folder: Path | str, target: Path | str) -> None:
    """Put the pages of a results folder, and the files that they link to, into one file to send.

    Args:
        folder: The results folder, with pages made by `build`.
        target: The file to write.

    Raises:
        LocogenError: If there are no pages.
        CannotWrite: The file cannot be written there.
    """
    folder = Path(folder).resolve()
    target = Path(target)
    if not (folder / "index.html").is_file():
        raise LocogenError(f"{folder} has no pages: make them first (locogen report {folder})")
    files = [file for file in sorted(folder.rglob("*")) if _is_sent(file.relative_to(folder), file)]
    with writing(target.parent), replacing(target) as part, ZipFile(part, "w", ZIP_DEFLATED) as zip:
        for file in files:
            zip.write(file, Path(folder.name) / file.relative_to(folder))


def _is_sent(name: Path, file: Path) -> bool:
    """Not the store's thousands of pictures, nothing hidden or half-written, no link elsewhere."""
    if name.parts[0] == "store" or any(part.startswith(".") for part in name.parts):
        return False
    return file.is_file() and not file.is_symlink() and file.suffix != ".zip"


# --- the pages of a run --------------------------------------------------------------------------


def _links_up(
    entries: Iterable[Entry], models: Mapping[str, str], concepts: Mapping[str, str]
) -> dict[str, str]:
    """Links from a run to the pages of its model and its concepts: address → words."""
    links = {}
    for entry in entries:
        links[f"../{models[entry.run.model]}"] = entry.run.model
        links[f"../{concepts[entry.concept]}"] = entry.concept
    return links


def run_page(
    run: Finished,
    notebook: Any,
    *,
    code: bool,
    entries: Sequence[Entry] = (),
    links: Mapping[str, str],
    source: str = "",
) -> str:
    """One run's page.

    Args:
        run: The run.
        notebook: From `read_notebook`; None if it has none.
        code: Whether to show the notebook's code; figures are then links to the page without it,
            which also has all that can be explored.
        entries: What the run says about concepts.
        links: Pages of its model and concepts, address → words.
        source: A hash of what the page is made from.

    Returns:
        The page's HTML.
    """
    body = ""
    if notebook is not None:
        body = notebook_html(notebook, run=run.folder.name, code=code)
    looks = Explorable() if code or run.error else explorable(run, entries, len(body))
    outcomes = [show_entry(entry) for entry in entries if entry.row]
    has_meaning = not (code or run.error) and _is_explained(run, entries)
    return page(
        "run.html",
        title=run.title,
        script=looks.script,
        data=looks.data,
        # The notebook's tables and pictures have sizes.
        allow_inline_styles=True,
        source=source,
        run=run,
        finding=_finding(run),
        date=str(run.facts.get("finished") or "")[:10],
        outcomes=outcomes,
        has_meaning=has_meaning,
        contents=_contents_list(looks, body, has_meaning=has_meaning),
        scripted=SCRIPTED,
        explorable=looks,
        body=body,
        code=code,
        links=links,
        files=_linked_files(run),
        tables=[] if code else _tables(run),
        facts=fact_groups(_footer_facts(run)),
    )


def _is_explained(run: Finished, entries: Sequence[Entry]) -> bool:
    """Whether `templates/meaning.html` knows what a run of this kind means."""
    return any(entry.row for entry in entries) or "evaluation" in run.tables


def _linked_files(run: Finished) -> dict[str, str]:
    """The run's files that its page links to, and their words."""
    return {name: words for name, words in FILES.items() if (run.folder / name).exists()}


def _contents_list(looks: Explorable, body: str, *, has_meaning: bool) -> list[tuple[str, str]]:
    """The page's table of contents: ids of headings, and their words."""
    parts = {
        "page.meaning": has_meaning,
        "page.windows": looks.sweeps,
        "page.edits": looks.arms,
        "page.maps": looks.maps,
    }
    contents = [(name, CONTENTS[name]) for name, is_there in parts.items() if is_there]
    contents += headings(body)
    if has_meaning:
        contents.append(("page.words", CONTENTS["page.words"]))
    return [*contents, ("page.how", CONTENTS["page.how"])]


def _finding(run: Finished) -> str:
    """What the run found, in its own words or else in those of `describe`."""
    # A run that failed shows its error; what it left need not be fit for a sentence.
    if run.error:
        return ""
    finding = run.finding.finding
    if not finding and run.effects is not None:
        finding = describe(run.effects, run.carriers)
    return finding


def _tables(run: Finished) -> list[ShownTable]:
    """The numbers behind the run's figures."""
    tables = []
    for name in run.tables:
        # A row for each picture, or for each cell of a map: these are what is looked at.
        if name in ("pictures", "shares"):
            continue
        try:
            table: Any = read_table(run.folder / f"{name}.csv")
        except Exception:  # pandas raises errors of many kinds
            continue
        if not 0 < len(table) <= MOST_ROWS:
            continue
        columns: Any = SHOWN_COLUMNS.get(name, table.columns)
        table = table[[column for column in columns if column in table]]
        rows = [[_cell(value) for value in line] for line in table.itertuples(index=False)]
        tables.append(ShownTable(name, [str(column) for column in table.columns], rows))
    return tables


def _cell(value: Any) -> Any:
    """A cell of a table for people."""
    if missing(value):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else value


def _footer_facts(run: Finished) -> dict[str, Mapping[str, Any]]:
    general = pick(run.facts, "model", "concepts", "kind", "pictures")
    if run.facts.get("finished"):
        general["finished"] = moment(run.facts["finished"])
    if "seconds" in run.facts:
        general["time"] = time_spent(run.facts)
    groups: dict[str, Mapping[str, Any]] = {"Run": general}
    for name in ("settings", "parameters", "versions"):
        groups[name.capitalize()] = run.group(name)
    return groups


def _write_run(
    run: Finished, entries: Sequence[Entry], links: Mapping[str, str], digest: str
) -> None:
    """Write a run's pages, with and without code, unless they are up to date."""
    source = _digest(digest, links, [list(entry.pictures) for entry in entries])
    names = ["index.html"]
    if run.has_notebook:
        names.append("code.html")
    if _are_up_to_date((run.folder / name for name in names), source):
        return

    for name, text in _run_pages(run, entries, links, source).items():
        try:
            _write(run.folder / name, text)
        except OSError as error:  # such as a folder of that name
            _warn(f"{run.folder.name}: {name} cannot be written: {reason_of(error)}")
        if len(text) > PAGE and len(text) > page_limit(run, _copied_pictures(run)):
            _warn(f"{run.folder / name} is large: {len(text) / 1e6:.1f} MB")


def _copied_pictures(run: Finished) -> list[str]:
    return sorted(file.name for file in (run.folder / "pictures").glob("*.png"))


def _run_pages(
    run: Finished, entries: Sequence[Entry], links: Mapping[str, str], source: str
) -> dict[str, str]:
    """File → page; with a notebook that cannot be read, one page with the reason."""
    making = functools.partial(run_page, run, entries=entries, links=links, source=source)
    try:
        notebook = read_notebook(run.folder / "notebook.ipynb")
        pages = {"index.html": making(notebook, code=False)}
        if notebook is not None:
            pages["code.html"] = making(notebook, code=True)
        return pages
    except CannotWrite:
        raise
    except Exception as error:  # nbformat, nbconvert and Pillow raise errors of many kinds
        reason = f"the notebook cannot be read: {reason_of(error)}"
        _warn(f"{run.folder.name}: {reason}")
        failed = replace(run, error=run.error or reason)
        return {"index.html": run_page(failed, None, code=False, links=links)}


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


# --- the pages of models and concepts ------------------------------------------------------------


def _write_comparisons(
    folder: Path,
    entries: Sequence[Entry],
    subject: str,
    files: Mapping[str, str],
    others: Mapping[str, str],
    digests: Mapping[Path, str],
) -> None:
    """Write the pages of all models or of all concepts, except those that are up to date.

    Args:
        folder: The results folder.
        entries: All entries.
        subject: What each page is about, "model" or "concept".
        files: Model or concept → its page.
        others: The same for what the entries of a page differ by.
        digests: Folder of a run → hash of what it left.
    """
    by = "concept" if subject == "model" else "model"
    for name, file in files.items():
        compared = [entry for entry in entries if entry.distinguished(subject) == name]
        linked = {entry.distinguished(by): others[entry.distinguished(by)] for entry in compared}
        title = f"The {subject} {name}"
        source = _digest(title, linked, [_contents(entry, digests) for entry in compared])
        if not _are_up_to_date([folder / file], source):
            text = comparison_page(title, compared, by=by, others=linked, source=source)
            _write(folder / file, text)


def _contents(entry: Entry, digests: Mapping[Path, str]) -> tuple[Any, ...]:
    """All of an entry that a comparison shows: if it is the same, so is the page."""
    return entry.concept, entry.name, list(entry.pictures), digests[entry.run.folder]


def _remove_stale(folder: Path, current: Collection[str]) -> None:
    """Remove the pages of models and concepts that no run is about any more; only our own."""
    for path in folder.glob("*.html"):
        is_comparison = re.fullmatch(r"(model|concept)-.+\.html", path.name)
        if not is_comparison or path.name in current or not path.is_file():
            continue
        if GENERATOR in _head(path):
            path.unlink()


# --- what is up to date --------------------------------------------------------------------------


def _digest_of_run(run: Finished) -> str:
    """A hash of all that a run left, and of the code that makes pages."""
    contents = [_digest_of_code(), run.error]
    for name in ("result.json", "error.json", *FILES):
        contents += [name, _digest_of_file(run.folder / name)]
    return _digest(contents)


def _digest_of_file(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:  # it is missing, or may not be read
        return str(error.strerror)


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:32]


@cache
def _digest_of_code() -> str:
    """A hash of what makes pages: this folder, its templates, how they are filled, the views."""
    here = Path(__file__).parent
    files = [*here.rglob("*.*"), *(here.parent / "views").glob("*.py"), here.parent / "markup.py"]
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.suffix != ".pyc":
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _are_up_to_date(pages: Iterable[Path], source: str) -> bool:
    """Whether the pages are there and were made from exactly this."""
    mark = f'<meta name="source" content="{source}">'
    return all(path.is_file() and mark in _head(path) for path in pages)


def _head(page: Path) -> str:
    with page.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(HEAD)


def _write(path: Path, text: str) -> Path:
    """Write a page whole or not at all."""
    write_whole(path, text.encode("utf-8", errors="replace"))
    return path
