"""The pages over many runs: the index, models × concepts, and a page for each model and concept.

They show entries (`locogen.pages.entries`) with one color scale a page. Markup is in
`templates/index.html` and `templates/comparison.html`; here is what they show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from locogen.files import data_uri
from locogen.markup import number, precision
from locogen.pages.entries import STATES, Entry
from locogen.pages.html import page
from locogen.pages.results import Finished, count_runs
from locogen.pages.thumbnails import Scale, heat_strip, small_curve, small_picture
from locogen.plan import KINDS, Window
from locogen.views.sentences import few_seeds_note
from locogen.views.tables import amount, ceiling_share, missing, proposal, sentence

TITLE = "Which layers carry what the model knows"
INDEX_PICTURE = 64  # pixels
CARD_PICTURE = 96
OTHER = "other"  # the outcome of edits and other notebooks, in the filter
FAILED = "failed or unfinished"
ELSE = "of an edit or another notebook"
LOCALIZING = "on where concepts come in"
RUNS = (FAILED, ELSE, LOCALIZING)  # every run is one of these
LEGEND_STEPS = 48  # cells of the legend's strip

# The keys are those of `index.js`; the first one is the order in which rows are written.
SORTS = {
    "given": "as in the study",
    "name": "concept",
    "carrier": "carrier, first layers first",
    "effect": "effect, largest first",
    "share": "share of the ceiling, largest first",
}
Addresses = Mapping[str, str]  # name of a model or concept → file of its page


@dataclass(frozen=True)
class Picture:
    """A small picture inside the page."""

    source: str
    """A `data:` address."""
    alt: str
    width: int = 0
    """Pixels on the screen; 0: the style decides."""
    caption: str = ""
    address: str = ""
    """The file that it links to."""


@dataclass(frozen=True)
class ShownEntry:
    """An entry in words and pictures, as the templates show it."""

    entry: Entry
    strip: Picture | None = None
    """The effect of each window; None if the run failed, as for all that follows."""
    place: str = ""
    """`layers 8–9`; empty without a single window, as for the next two."""
    amount: str = ""
    """`0.34 [0.28, 0.40]`."""
    share: str = ""
    """Share of the ceiling, `85 % [70 %, 102 %]`."""
    reason: str = ""
    """Why there is a single window, or why there is none; or what is proposed."""
    pictures: Sequence[Picture] = ()
    cells: Sequence[tuple[int, str]] = ()
    """Each window of the strip: its first layer, and `layers 8–9: 0.34 [0.28, 0.40]`."""

    @property
    def run(self) -> Finished:
        """The entry's run."""
        return self.entry.run

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        return STATES[self.entry.state][0]

    @property
    def style(self) -> str:
        """The CSS class of the verdict."""
        return STATES[self.entry.state][1]

    @property
    def note(self) -> str:
        """What intervals over few seeds are worth, to end a sentence with."""
        # Where no number is shown, the reason has said why.
        has_interval = bool(self.entry.row) and not missing(self.entry.row["low"])
        return few_seeds_note(self.entry.seeds) if has_interval else ""

    @property
    def published(self) -> str:
        """Where the authors of LocoGen found concepts of this kind in this model, if anywhere."""
        start = self.run.finding.published
        return "" if start is None else f"published: from layer {start}"

    @property
    def window_address(self) -> str:
        """The run's page at one of the windows, whose first layer comes after it."""
        # A page with several sweeps has to be told which one is meant.
        several = len(self.run.findings) > 1
        concept = f"concept={quote(str(self.entry.row['label']))}&" if several else ""
        return f"{self.run.address}/index.html#{concept}window="

    @property
    def ends(self) -> tuple[str, str]:
        """The first and the last layer of the strip, for its axis."""
        width = int(self.entry.row["width"])
        return str(self.cells[0][0]), str(self.cells[-1][0] + width - 1)

    @property
    def sort_values(self) -> dict[str, Any]:
        """Data attributes by which `index.js` filters and sorts; what is missing has none."""
        values: dict[str, Any] = {"state": self.entry.state, "kind": self.entry.kind}
        if self.place:
            for name in ("start", "estimate", "share"):
                values[name] = self.entry.row[name]
        return {
            f"data-{name}": str(value)
            for name, value in values.items()
            if value != "" and not missing(value)
        }


def index_page(
    runs: Sequence[Finished],
    entries: Sequence[Entry],
    models: Addresses,
    concepts: Addresses,
    *,
    title: str = "",
) -> str:
    """The page over all runs: concepts down, models across.

    Args:
        runs: All runs of the results folder.
        entries: What they say about concepts.
        models: Model → its page, in the order of the columns.
        concepts: Concept → its page, in the order of the rows.
        title: Of the study; empty: a general one.

    Returns:
        The page's HTML.
    """
    entries = list(entries)
    scale = _scale(entries)
    in_matrix = {entry.run.folder for entry in entries}
    other_runs = [run for run in runs if run.folder not in in_matrix]
    return page(
        "index.html",
        title=title or TITLE,
        script="index.js" if entries else "",
        counts=_counts_sentence(runs, entries),
        legend=_legend(scale, entries),
        filters=_filters(entries, other_runs, models),
        models=models,
        rows=_matrix(entries, models, concepts, scale),
        other_runs=[(run, _filtered_by(run)) for run in other_runs],
    )


def comparison_page(
    title: str, entries: Sequence[Entry], *, by: str, others: Addresses, source: str = ""
) -> str:
    """The page of one model or of one concept: its runs next to each other on one scale.

    Args:
        title: The page's heading.
        entries: Entries of that model or concept.
        by: What distinguishes them, "concept" or "model".
        others: Name of that concept or model → its page.
        source: A hash of what the page is made from.

    Returns:
        The page's HTML.
    """
    scale = _scale(entries)
    with_effects = [entry for entry in entries if entry.rows is not None]
    # Curves show intervals as well, so their scale is larger than that of the strips.
    effects = (entry.effects for entry in _measured(entries))
    bounds = Scale.of(effects, ("estimate", "low", "high"))
    lines = []
    for entry in entries:
        name = entry.distinguished(by)
        lines.append((name, others[name], show_entry(entry, scale)))
    return page(
        "comparison.html",
        title=title,
        script="index.js" if any(entry.row for entry in entries) else "",
        source=source,
        counts=_counts_sentence([entry.run for entry in entries], entries),
        legend=_legend(scale, entries),
        by=by,
        lines=lines,
        cards=[_card(entry, by, bounds) for entry in with_effects],
        headings=["window start", *(_full_name(entry, by) for entry in with_effects)],
        numbers=_numbers(with_effects),
    )


# --- both pages ----------------------------------------------------------------------------------


def _counts_sentence(runs: Iterable[Finished], entries: Sequence[Entry]) -> str:
    """How many runs there are, and how many entries of each state: all numbers add up."""
    # A run of several concepts is named once for each of them.
    distinct = {run.folder: run for run in runs}
    localizing = {entry.run.folder for entry in entries}
    kinds = Counter(_kind_of_run(run, localizing) for run in distinct.values())
    shown = [f"{kinds[kind]} {kind}" for kind in RUNS if kinds[kind]]
    if not kinds[FAILED]:
        shown.append("none failed")
    text = f"{count_runs(list(distinct.values()))}, {', '.join(shown)}."
    return text + _outcomes_sentence(entries)


def _outcomes_sentence(entries: Iterable[Entry]) -> str:
    states = Counter(entry.state for entry in entries)
    del states["failed"]
    outcomes = [f"{states[state]} {words}" for state, (words, _) in STATES.items() if states[state]]
    if not outcomes:
        return ""
    total = sum(states.values())
    return f" {total} outcome{'s' if total > 1 else ''}: {', '.join(outcomes)}."


def _kind_of_run(run: Finished, localizing: Collection[Path]) -> str:
    """One of `RUNS`. `localizing`: folders of the runs that say something about a concept."""
    if run.error:
        return FAILED
    return LOCALIZING if run.folder in localizing else ELSE


def _scale(entries: Iterable[Entry]) -> Scale:
    return Scale.of(entry.rows for entry in _measured(entries))


def _measured(entries: Iterable[Entry]) -> list[Entry]:
    """Those whose effects have one scale: a share is of another unit, and may be far beyond 1."""
    with_effects = [entry for entry in entries if entry.rows is not None]
    return [entry for entry in with_effects if not entry.is_proposal] or with_effects


def _legend(scale: Scale, entries: Sequence[Entry]) -> dict[str, Any]:
    """What the colors mean, and whether they may be compared."""
    length = scale.high - scale.low
    last = LEGEND_STEPS - 1
    values = [scale.low + length * step / last for step in range(LEGEND_STEPS)]
    digits = precision(scale.low, scale.high)
    low = number(scale.low, digits)
    high = number(scale.high, digits)
    alt = f"Colors from {low} over white at 0 to {high}: blue below zero, red above."
    strip = Picture(data_uri(heat_strip(values, scale)), alt)
    proposed = [entry.is_proposal for entry in entries if entry.rows is not None]
    return {
        "strip": strip,
        "low": low,
        "high": high,
        "scorers": _scorers(entries),
        "has_proposals": any(proposed),
        # Without any strip the page speaks of effects: what failed would have measured some.
        "has_effects": not proposed or not all(proposed),
    }


def _scorers(entries: Iterable[Entry]) -> list[str]:
    """The scorers of all runs that succeeded."""
    scorers = set()
    for entry in entries:
        scorer = entry.run.group("settings").get("scorer")
        if entry.row and scorer:
            scorers.add(str(scorer))
    return sorted(scorers)


def show_entry(
    entry: Entry, scale: Scale | None = None, *, pictures: Sequence[Picture] = ()
) -> ShownEntry:
    """An entry in words and pictures.

    Args:
        entry: The entry.
        scale: Which effects have the strongest colors; None: without a strip.
        pictures: Its small pictures.
    """
    row = entry.row
    if not row:
        return ShownEntry(entry)
    place = ""
    size = ""
    share = ""
    if row.get("verdict", "").startswith("each "):
        place = " and ".join(_place(each.start, each.width) for each in row["places"])
    if row["start"] is not None:
        place = _place(row["start"], row["width"])
        size = amount(row)
        if not missing(row["share"]):
            share = ceiling_share(row)
    reason = str(row.get("reason") or "")
    if entry.state == "proposed":
        reason = proposal(row, _place(row["at"], row["width"]))
    if scale is None:
        return ShownEntry(entry, None, place, size, share, reason, pictures)
    cells = _cells(entry)
    return ShownEntry(entry, _strip(entry, scale), place, size, share, reason, pictures, cells)


def _cells(entry: Entry) -> list[tuple[int, str]]:
    """What `index.js` says of each cell of a strip, and where it leads."""
    cells = []
    for row in entry.rows.to_dict("records"):
        start = int(row["position"])
        size = "not looked at" if missing(row["estimate"]) else amount(row)
        cells.append((start, f"{_place(start, entry.row['width'])}: {size}"))
    return cells


def _strip(entry: Entry, scale: Scale) -> Picture:
    """The effect of each window in color, the carrier outlined."""
    places = list(entry.rows["position"])
    start = entry.row["start"]
    marked = places.index(start) if start in places else None
    if entry.is_proposal:
        scale = Scale.of([entry.rows])
    png = heat_strip(entry.rows["estimate"], scale, marked=marked)
    return Picture(data_uri(png), f"{entry.run.model}, {sentence(entry.row, short=True)}")


def _place(start: int, width: int) -> str:
    """The window in words, with the dash that typesetters put between numbers."""
    return str(Window(start, width)).replace("-", "–")


def _pictures(entry: Entry, files: Mapping[str, Path], size: int) -> list[Picture]:
    """Pictures of an entry made small, each with the address of the original."""
    pictures = []
    for label, file in files.items():
        small = small_picture(file, size)
        if small is None:
            continue
        words = label
        if label not in ("baseline", "ceiling"):
            words = f"layers {label.replace('-', '–')} replaced"
        pictures.append(
            Picture(
                source=data_uri(small, "image/webp"),
                alt=f"{entry.concept} in {entry.run.model}: {words}",
                # Smaller than they are, so that they are sharp on screens of high resolution.
                width=size * 3 // 4,
                caption=words,
                address=f"{entry.run.address}/pictures/{quote(file.name)}",
            )
        )
    return pictures


# --- the index -----------------------------------------------------------------------------------


def _filters(
    entries: Sequence[Entry], other_runs: Sequence[Finished], models: Addresses
) -> list[dict[str, Any]]:
    """The select fields of the form above the matrix: name, label, and value → words."""
    outcomes = {state: words for state, (words, _) in STATES.items()} | {OTHER: "edits and other"}
    kinds_present = {entry.kind for entry in entries} | {run.finding.kind for run in other_runs}
    states_present = {entry.state for entry in entries} | {_state_of(run) for run in other_runs}
    names = list(dict.fromkeys([*models, *(run.model for run in other_runs)]))
    fields = [
        _select("model", "Model", dict(zip(names, names, strict=True)), names),
        _select("kind", "Kind", dict(zip(KINDS, KINDS, strict=True)), kinds_present),
        _select("state", "Outcome", outcomes, states_present),
        {"name": "sort", "label": "Sort by", "options": SORTS},
    ]
    # One column needs no choice.
    return fields if len(names) > 1 else fields[1:]


def _filtered_by(run: Finished) -> dict[str, str]:
    """Data attributes by which `index.js` filters a run that localizes nothing."""
    values = {"data-model": run.model, "data-kind": run.finding.kind, "data-state": _state_of(run)}
    return {name: value for name, value in values.items() if value}


def _state_of(run: Finished) -> str:
    """The outcome by which a run that localizes nothing is filtered."""
    return "failed" if run.error else OTHER


def _select(
    name: str, label: str, words: Mapping[Any, str], present: Collection[str]
) -> dict[str, Any]:
    """A select field with what occurs: any other choice would show nothing."""
    options = {value: words[value] for value in words if value in present}
    return {"name": name, "label": label, "options": {"": "all"} | options}


def _matrix(
    entries: Sequence[Entry], models: Addresses, concepts: Addresses, scale: Scale
) -> list[dict[str, Any]]:
    """A row for each concept: its name, page and kind, and its entries by model."""
    rows = {}
    for concept, address in concepts.items():
        cells: dict[str, list[ShownEntry]] = {model: [] for model in models}
        rows[concept] = {"concept": concept, "address": address, "kind": "", "cells": cells}
    for entry in entries:
        row = rows[entry.concept]
        # A run that failed early may not know its kind.
        row["kind"] = row["kind"] or entry.kind
        # Baseline and carrier only: the index should stay small.
        files = {label: file for label, file in entry.pictures.items() if label != "ceiling"}
        pictures = _pictures(entry, files, INDEX_PICTURE)
        row["cells"][entry.run.model].append(show_entry(entry, scale, pictures=pictures))
    return list(rows.values())


# --- a model, a concept --------------------------------------------------------------------------


def _card(entry: Entry, by: str, bounds: Scale) -> dict[str, Any]:
    """One run's curve and pictures, with its finding as caption."""
    words = sentence({**entry.row, "seeds": entry.seeds})
    curve = data_uri(small_curve(entry.effects, entry.concept, bounds))
    what = "Share" if entry.is_proposal else "Effect"
    return {
        "run": entry.run,
        "name": _full_name(entry, by),
        "curve": Picture(curve, f"{what} of each window. {words}", width=380),
        "sentence": words,
        "pictures": _pictures(entry, entry.pictures, CARD_PICTURE),
    }


def _numbers(entries: Sequence[Entry]) -> list[list[str]]:
    """All effects with their intervals: a row for each window, a column for each entry."""
    columns = []
    starts = set()
    for entry in entries:
        column = {int(row["position"]): row for row in entry.rows.to_dict("records")}
        columns.append(column)
        starts.update(column)
    rows = []
    for start in sorted(starts):
        amounts = [amount(column[start]) if start in column else "–" for column in columns]
        rows.append([str(start), *amounts])
    return rows


def _full_name(entry: Entry, by: str) -> str:
    """The name by which a page distinguishes its entries, and the entry's own."""
    name = entry.distinguished(by)
    return f"{name} · {entry.name}" if entry.name else name
