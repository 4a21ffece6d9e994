"""What runs have left in a results folder, read without trust, and what it says about each concept.

A run's folder holds `notebook.ipynb`, `pictures.csv`, `effects.csv` and `result.json`, or `error.json` where it failed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from locogen.errors import LocogenError
from locogen.files import ENCODING, write_whole, writing
from locogen.plan import Window
from locogen.studies.planning import slugify
from locogen.studies.records import Record, read_record
from locogen.views.tables import findings, rows_of, strip_rows

if TYPE_CHECKING:
    import pandas as pd

STATES = {  # in words, and the class they are shown with
    "localized": ("localized", "good"),
    "open": ("lead open", ""),
    "none": ("no single window", ""),
    "unjudged": ("not judged", ""),
    "failed": ("failed", "bad"),
}
KINDS = ("style", "object", "fact")

TEXTS = ("method", "concept", "axis", "kind", "prompts", "prompt", "role", "image")  # columns
_NEEDED = ("concept", "axis", "position", "estimate")  # of a table of effects
_WHOLE = ("position", "width", "n")
_DRAWN = ("position", "width", "estimate", "low", "high")
_HIGHEST = 1e6  # of what is drawn: no score or layer comes near it
_MOST_ROWS = 100_000


@dataclass(frozen=True)
class Finished:
    """One run's folder as it was found: no `effects` and `carriers` where it failed, or was no localization."""

    folder: Path
    facts: Mapping[str, Any]
    error: str = ""
    effects: Any = None  # the effects table, a DataFrame
    carriers: Mapping[str, Window] = field(default_factory=dict)
    found: Sequence[Mapping[str, Any]] = ()  # rows of `locogen.views.tables.findings`
    cell: int | None = None  # the number of the cell that failed

    @property
    def title(self) -> str:
        """What the run calls itself, or its folder's name."""
        return str(self.facts.get("title") or self.folder.name)

    @property
    def address(self) -> str:
        """Its folder as part of a link."""
        return quote(self.folder.name)

    @property
    def model(self) -> str:
        """The model's name, or a dash."""
        return str(self.facts.get("model") or "–")


@dataclass(frozen=True)
class Entry:
    """One concept of one run: a cell of the index, a row on the pages of its model and concept."""

    run: Finished
    concept: str
    state: str  # one of STATES
    name: str = ""  # what tells it from others of its concept and model; often nothing is needed
    row: Mapping[str, Any] = field(
        default_factory=dict
    )  # of `locogen.views.tables.findings`; empty where it failed
    rows: Any = None  # the effects of its windows, a DataFrame sorted by position
    pictures: Mapping[str, Path] = field(default_factory=dict)  # label → file beside the page

    @property
    def kind(self) -> str:
        """Style, object or fact; empty where nobody said."""
        return str(self.row.get("kind") or self.run.facts.get("kind") or "")

    @property
    def effects(self) -> Any:
        """All rows of the run's table that belong here: same concept, method and width; controls included."""
        table, first = self.run.effects, self.rows.iloc[0]
        for column in ("concept", "method", "width"):
            if column in table:
                table = table[
                    (table[column] == first[column]) | (table[column].isna() & (column == "width"))
                ]
        return table


def read_runs(folder: Path | str) -> list[Finished]:
    """All runs of a results folder, what failed last. Raises `LocogenError` where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LocogenError(
            f"there is no folder {folder}: make results first, with `python -m locogen run`"
        )
    places = sorted(
        place for place in folder.iterdir() if place.is_dir() and not place.is_symlink()
    )
    order = read_study_facts(folder).get("runs", [])
    runs = [
        read_run(place) for place in places if not place.name.startswith(".") and _is_run(place)
    ]
    if not runs:
        raise LocogenError(f"{folder} holds no run: make some first, with `python -m locogen run`")

    def rank(run: Finished) -> tuple[bool, int, int, str, str]:
        kind = str(run.facts.get("kind"))
        place = order.index(run.folder.name) if run.folder.name in order else len(order)
        kinds = KINDS.index(kind) if kind in KINDS else len(KINDS)
        return bool(run.error), kinds, place, str(run.facts.get("finished", "")), run.folder.name

    return sorted(runs, key=rank)


def read_study_facts(folder: Path) -> Mapping[str, Any]:
    """What a results folder says of its study: title, order of the runs, base; empty where it says nothing."""
    return read_record(folder / "study.json").facts


def read_run(folder: Path) -> Finished:
    """What a run left; one whose files are missing or unreadable comes back as failed, whatever is in them."""
    try:
        return _read(folder)
    except Exception as error:  # of one run; the others are to be shown all the same
        return damaged(folder, {}, error)


def damaged(folder: Path, facts: Mapping[str, Any], error: Exception) -> Finished:
    """A run that cannot be shown, with the reason; of what it says, only names are kept."""
    names = ("title", "model", "concepts", "kind", "notebook")
    known = {name: facts[name] for name in names if name in facts}
    return Finished(folder, known, f"its results are damaged: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    """An error in a line of text that a page can hold."""
    text = f"{type(error).__name__}: {error}".encode("utf-8", errors="replace").decode("utf-8")
    return " ".join(text.split())


def _read(folder: Path) -> Finished:
    if os.path.lexists(folder / "result.json"):
        return _read_result(folder, read_record(folder / "result.json"))
    if not os.path.lexists(folder / "error.json"):
        return Finished(folder, {}, "unfinished: it was stopped, or is still running")
    record = read_record(folder / "error.json")
    error = record.facts.get("error") or record.damage or "it says nothing about its error"
    return Finished(folder, record.facts, error, cell=record.facts.get("cell"))


def _read_result(folder: Path, record: Record) -> Finished:
    facts = record.facts
    if record.damage:
        return Finished(folder, facts, record.damage)
    if "error" in facts:
        return Finished(folder, {}, facts["error"])
    if not facts.get("carriers") and not (folder / "effects.csv").exists():
        return Finished(
            folder, facts
        )  # a notebook that localizes nothing: its finding is all there is to list
    try:
        effects = read_effects(folder / "effects.csv")
        carriers = {row["concept"]: _window(row) for row in facts.get("carriers", [])}
        rows = findings(effects, carriers)
    except Exception as error:  # pandas raises what it likes
        return Finished(folder, facts, f"its results cannot be read: {reason_of(error)}")
    return Finished(folder, facts, "", effects, carriers, rows)


def entries(runs: Iterable[Finished]) -> list[Entry]:
    """What the runs say, an entry for each concept of each; runs that localize nothing have none.

    A failed run stands under the concept that its parameters name, where another run says what that is called.
    """
    runs = list(runs)
    good = [run for run in runs if run.effects is not None]
    names = {
        _asked(run): next(iter(run.carriers))
        for run in good
        if _asked(run) and len(run.carriers) == 1
    }
    other = {run.facts.get("notebook") for run in runs if run.effects is None and not run.error}
    other -= {run.facts.get("notebook") for run in good}
    found = []
    for run in runs:
        if run.effects is not None:
            found += [_entry(run, row) for row in run.found]
        elif run.error and not (run.facts.get("notebook") and run.facts["notebook"] in other):
            named = [names[_asked(run)]] if _asked(run) in names else run.facts.get("concepts")
            named = named if isinstance(named, list) and named else [run.title]
            found += [_told(Entry(run, str(concept), "failed")) for concept in named]
    often = Counter((entry.concept, entry.run.model, entry.name) for entry in found)
    return [
        entry
        if often[entry.concept, entry.run.model, entry.name] == 1
        else replace(entry, name=f"{entry.name or entry.concept}, {entry.run.folder.name}")
        for entry in found
    ]


def _told(entry: Entry) -> Entry:
    """An entry with what its run is called, or its row among several of the run, less its concept and model."""
    label = str(entry.row.get("label") or entry.concept)
    own = label if label != entry.concept else entry.run.title
    if own == entry.concept or own.startswith(f"{entry.concept}, "):
        marks = own.removeprefix(entry.concept).split(", ")
        own = ", ".join(mark for mark in marks if mark not in ("", entry.run.model))
    return replace(entry, name=own)


def _entry(run: Finished, row: Mapping[str, Any]) -> Entry:
    if row["start"] is not None:
        state = "open" if "not established" in str(row["reason"]) else "localized"
    else:
        state = "none" if row["judged"] else "unjudged"
    return _told(
        Entry(run, str(row["concept"]), state, row=row, rows=rows_of(run.effects, row["label"]))
    )


def _asked(run: Finished) -> str:
    """The concept's id among the run's parameters."""
    asked = run.facts.get("parameters")
    return (
        str(asked.get("concept") or "")
        if isinstance(asked, Mapping) and not asked.get("prompt")
        else ""
    )


def shown_pictures(entry: Entry) -> dict[str, Path]:
    """Baseline, carrier and ceiling of an entry's first prompt and seed: label → file in the run's own `pictures/`.

    They are copied there from the store, so that a results folder shows them without it. Empty where there are none.
    """
    table = entry.run.folder / "pictures.csv"
    try:
        rows: Any = read_table(table)
        rows = rows[
            (rows["concept"] == entry.concept)
            & (rows["width"].isna() | (rows["width"] == entry.row["width"]))
        ]
        rows = strip_rows(rows, entry.run.carriers[entry.concept]).drop_duplicates("label")
        rows = rows[rows["marked"] | (rows["role"] != "window")]
        named = zip(rows["label"], rows["image"], strict=True)
        files = {str(label): _kept(entry.run, str(image)) for label, image in named}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        return {}
    return {label: file for label, file in files.items() if file is not None}


def _kept(run: Finished, image: str) -> Path | None:
    """A picture in the run's `pictures/`, fetched from its store if need be; only the name of `image` counts.

    Links are not followed, neither to read nor to write: a results folder comes from anywhere.
    """
    name = Path(image).name
    kept = run.folder / "pictures" / name
    if kept.parent.is_symlink() or kept.is_symlink() or not name.endswith(".png"):
        return None
    if kept.is_file():
        return kept
    for store in (run.folder.parent / "store", *_own_stores(run)):
        source = store / name
        if source.is_file() and not source.is_symlink():
            with writing(run.folder):
                kept.parent.mkdir(exist_ok=True)
            write_whole(kept, source.read_bytes())
            return kept
    return None


def _own_stores(run: Finished) -> Iterator[Path]:
    """The store that a run names itself, in the study's folder: results come from anywhere, and could name any place.

    So it has to be a picture store too, that is, to hold the record of a run.
    """
    results = run.folder.parent.absolute()
    place = read_study_facts(results).get("base", "")
    up = place if re.fullmatch(r"\.|\.\.(/\.\.)*", place) else ".."
    base = Path(os.path.normpath(results / up)).resolve()
    own = run.facts.get("parameters", {}).get("store")
    store = (base / own).resolve() if isinstance(own, str) and own else base
    if store != base and store.is_relative_to(base) and any(store.glob("run-*.json")):
        yield store


def addresses(prefix: str, names: Sequence[str]) -> dict[str, str]:
    """The page of each name: `model-mini.html`; of names that slug alike, the later ones get a hash."""
    found: dict[str, str] = {}
    for name in names:
        address = f"{prefix}-{slugify(name)}.html"
        if address in found.values():
            address = (
                f"{prefix}-{slugify(name)}-{hashlib.sha256(name.encode()).hexdigest()[:6]}.html"
            )
        found.setdefault(name, address)
    return found


def read_table(path: Path) -> pd.DataFrame:
    """A run's CSV. Only an empty cell is missing: a concept may be called "NA" or "1984"."""
    import pandas as pd

    text: Any = dict.fromkeys(TEXTS, str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""], encoding=ENCODING)


def read_effects(path: Path) -> pd.DataFrame:
    """A run's table of effects, checked: what draws it may rely on the columns and on finite numbers.

    Args:
        path: `effects.csv`.

    Returns:
        The table.

    Raises:
        ValueError: A column is missing or does not hold what it should; also for what pandas cannot read.
    """
    table = read_table(path)
    missing = [name for name in _NEEDED if name not in table]
    if missing:
        raise ValueError(f"{path.name} has no column {missing[0]}")
    if len(table) > _MOST_ROWS:
        raise ValueError(
            f"{path.name} has {len(table)} rows, and more than {_MOST_ROWS} are not shown"
        )
    for name in dict.fromkeys([*_DRAWN, *_WHOLE]):
        if name in table:
            _check_numbers(table[name], name)
    windows: Any = table[table["axis"] == "layer"]
    for name in _NEEDED:
        if windows[name].isna().any():
            raise ValueError(f"{path.name} has a window without {name}")
    return table


def _check_numbers(column: Any, name: str) -> None:
    """Raise `ValueError` unless all that is not missing is a number of a size that can be drawn."""
    import pandas as pd

    present: Any = pd.to_numeric(column.dropna())
    numbers = present.astype(float)  # (rows that have one,)
    if pd.api.types.is_bool_dtype(column) or not (numbers.abs() <= _HIGHEST).all():
        raise ValueError(f"the column {name} has a value that is no number up to {_HIGHEST:.0e}")
    if name in _WHOLE and not ((numbers >= 0) & (numbers == numbers.round())).all():
        raise ValueError(f"the column {name} has a value that is no whole number from 0 up")


def _is_run(folder: Path) -> bool:
    """Whether a folder has a file of a run; one that cannot be looked into may well be one."""
    with contextlib.suppress(PermissionError):
        return any(
            os.path.lexists(folder / name)
            for name in ("result.json", "error.json", "notebook.ipynb")
        )
    return True


def _window(row: Mapping[str, Any]) -> Window:
    reason = str(row.get("reason") or "")
    return Window(row.get("start"), row.get("width", 1), reason)
