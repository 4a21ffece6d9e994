"""What runs say about each concept: an `Entry` for each concept of each run, and its name.

An entry is a cell of the index, and a row on the pages of its model and its concept.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from locogen.finding import is_count
from locogen.pages.results import Finished
from locogen.studies.planning import slugify
from locogen.views.tables import rows_of

# State → how it is written, and the CSS class that it is shown with.
STATES = {
    "localized": ("localized", "good"),
    "open": ("lead open", ""),
    "several": ("several places", ""),
    "spread": ("spread", ""),
    "none": ("no single window", ""),
    "nobody": ("no layer hears it", ""),
    "inconclusive": ("inconclusive", ""),
    "proposed": ("proposal, not tested by pictures", ""),
    "unjudged": ("not judged", ""),
    "failed": ("failed", "bad"),
}


# Kind of a verdict without one place → state.
_NO_PLACE = {
    "each necessary": "several",
    "each sufficient": "several",
    "spread": "spread",
    "nobody": "nobody",
    "inconclusive": "inconclusive",
}


@dataclass(frozen=True)
class Entry:
    """One concept of one run."""

    run: Finished
    concept: str
    state: str
    """One of `STATES`."""
    name: str = ""
    """What distinguishes it from others of its concept and model; usually empty."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Of `locogen.views.tables.findings`; empty if the run failed."""
    rows: Any = None
    """The effects of its windows, a DataFrame sorted by position."""
    pictures: Mapping[str, Path] = field(default_factory=dict)
    """Label → picture file in the run's folder."""

    def distinguished(self, by: str) -> str:
        """What it is called on a page where entries differ by "concept" or by "model"."""
        return self.concept if by == "concept" else self.run.model

    @property
    def kind(self) -> str:
        """Style, object or fact; empty if the run does not say."""
        return str(self.row.get("kind") or self.run.facts.get("kind") or "")

    @property
    def is_proposal(self) -> bool:
        """Whether its numbers are shares that gradients propose, and no changes of a score."""
        return bool(self.row.get("proposed"))

    @property
    def seeds(self) -> float:
        """How many seeds each prompt has, by its table or else the run's settings; NaN: unknown."""
        counted = self.row.get("seeds", math.nan)
        if not math.isnan(counted):
            return counted
        seeds: Any = self.run.group("settings").get("seeds")
        if isinstance(seeds, list):
            return len(seeds)
        return seeds if is_count(seeds) else math.nan

    @property
    def effects(self) -> Any:
        """The table's rows of the same concept, method and width; controls included."""
        table = self.run.effects
        first = self.rows.iloc[0]
        for column in ("concept", "method", "width"):
            if column not in table:
                continue
            belongs = table[column] == first[column]
            # Controls replace all layers, so they have no width.
            if column == "width":
                belongs |= table[column].isna()
            table = table[belongs]
        return table


def entries(runs: Iterable[Finished]) -> list[Entry]:
    """What the runs say, an entry for each concept of each; runs that localize nothing have none.

    Args:
        runs: All runs of a study: they help to name each other's concepts.

    Returns:
        The entries, in the order of the runs. No two of a concept and model have the same name.
    """
    runs = list(runs)
    names = _concept_names(runs)
    other_notebooks = _notebooks_without_effects(runs)
    every: list[Entry] = []
    for run in runs:
        if run.effects is not None:
            every += [_entry(run, row) for row in run.findings]
        # A failed edit is not a failed localization: it is listed elsewhere.
        elif run.error and run.facts.get("notebook") not in other_notebooks:
            every += _failed_entries(run, names)
    return _distinguish(every)


def _concept_names(runs: Sequence[Finished]) -> dict[str, str]:
    """Concept id among the parameters → the concept's name, as successful runs have them.

    A run that failed early knows only the id ("mini/neon"); it is shown with the other runs of
    that concept ("neon").
    """
    names = {}
    for run in runs:
        concept_id = _concept_id(run)
        if run.effects is not None and concept_id and len(run.carriers) == 1:
            names[concept_id] = next(iter(run.carriers))
    return names


def _concept_id(run: Finished) -> str:
    """The concept's id among the run's parameters; a prompt, if there is one, replaces it."""
    parameters = run.group("parameters")
    if parameters.get("prompt"):
        return ""
    return str(parameters.get("concept") or "")


def _notebooks_without_effects(runs: Sequence[Finished]) -> set[str]:
    """Notebooks whose successful runs never localize anything."""
    notebooks = set()
    localizing = set()
    for run in runs:
        if run.effects is not None:
            localizing.add(run.facts.get("notebook"))
        elif not run.error:
            notebooks.add(run.facts.get("notebook"))
    # A run that does not name its notebook says nothing about that of others.
    return notebooks - localizing - {None, ""}


def _failed_entries(run: Finished, names: Mapping[str, str]) -> list[Entry]:
    """An entry for each concept that a failed run would have localized, as far as is known."""
    concept_id = _concept_id(run)
    concepts = run.facts.get("concepts")
    if concept_id in names:
        concepts = [names[concept_id]]
    elif not isinstance(concepts, list) or not concepts:
        concepts = [run.title]
    return [_with_name(Entry(run, str(concept), "failed")) for concept in concepts]


def _entry(run: Finished, row: Mapping[str, Any]) -> Entry:
    rows = rows_of(run.effects, row["label"])
    return _with_name(Entry(run, str(row["concept"]), _state(row), row=row, rows=rows))


def _state(row: Mapping[str, Any]) -> str:
    if not row["judged"]:
        return "proposed" if row["proposed"] else "unjudged"
    if row["start"] is None:
        return _NO_PLACE.get(row.get("verdict", ""), "none")
    # Older runs named a window also where its lead over others was open; the reason says so.
    is_open = "not established" in str(row["reason"])
    return "open" if is_open else "localized"


def _with_name(entry: Entry) -> Entry:
    """The entry with its name: the run's title, or its row's label, less concept and model."""
    # The label differs from the concept if a run has several rows for it: "neon · width 4".
    name = str(entry.row.get("label") or entry.concept)
    if name == entry.concept:
        name = entry.run.title
    if name != entry.concept and not name.startswith(f"{entry.concept}, "):
        return replace(entry, name=name)

    # The page already says "neon" and "mini": of "neon, mini, seeds 2" only "seeds 2" is left.
    parts = name.removeprefix(entry.concept).split(", ")
    further = [part for part in parts if part not in ("", entry.run.model)]
    return replace(entry, name=", ".join(further))


def _distinguish(every: Sequence[Entry]) -> list[Entry]:
    """Add the folder's name where entries of a concept and model have the same name."""
    counts = Counter((entry.concept, entry.run.model, entry.name) for entry in every)
    distinct = []
    for entry in every:
        if counts[entry.concept, entry.run.model, entry.name] > 1:
            name = f"{entry.name or entry.concept}, {entry.run.folder.name}"
            entry = replace(entry, name=name)
        distinct.append(entry)
    return distinct


def addresses(prefix: str, names: Sequence[str]) -> dict[str, str]:
    """Name → the file of its page: `model-mini.html`.

    Two names may have the same slug: the later ones get a hash.
    """
    files: dict[str, str] = {}
    for name in names:
        file = f"{prefix}-{slugify(name)}.html"
        if file in files.values():
            digest = hashlib.sha256(name.encode()).hexdigest()[:6]
            file = f"{prefix}-{slugify(name)}-{digest}.html"
        files.setdefault(name, file)
    return files
