"""What runs left in a results folder, read without trust.

A run's folder holds `notebook.ipynb`, `pictures.csv`, `effects.csv` and `result.json`, or
`error.json` if it failed. A results folder may come from anywhere: whatever is in a run's folder,
it is read as a `Finished`, and one that cannot be used says why.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from locogen.errors import LocogenError
from locogen.files import ENCODING
from locogen.finding import Finding
from locogen.plan import KINDS, Window
from locogen.studies.records import Record, read_record
from locogen.views.tables import findings

if TYPE_CHECKING:
    import pandas as pd

TABLES = (
    *("pictures", "effects", "evaluation", "summary", "grid", "neurons", "changes"),
    *("localizers", "agreement", "sides", "trace", "shares"),
)

# Columns of text: pandas would read a concept called "1984" as a number.
TEXTS = ("method", "concept", "axis", "kind", "prompts", "prompt", "role", "image")
_NEEDED = ("concept", "axis", "position", "estimate")  # columns of every table of effects
_WHOLE_NUMBERS = ("position", "width", "n")
_NUMBERS = ("position", "width", "estimate", "low", "high", "n")
_LARGEST = 1e6  # no score or layer comes near it, and matplotlib can still draw it
_MOST_ROWS = 100_000


@dataclass(frozen=True)
class Finished:
    """One run's folder. Without `effects` if the run failed, or localizes nothing."""

    folder: Path
    facts: Mapping[str, Any]
    """The keys of `result.json` or `error.json`, checked by `read_record`."""
    error: str = ""
    """Why it cannot be shown; empty if all is well."""
    effects: Any = None
    """The effects table, a DataFrame."""
    carriers: Mapping[str, Window] = field(default_factory=dict)
    findings: Sequence[Mapping[str, Any]] = ()
    """Rows of `locogen.views.tables.findings`."""
    cell: int | None = None
    """The number of the cell that failed."""

    @property
    def title(self) -> str:
        """The run's title, or its folder's name."""
        return str(self.facts.get("title") or self.folder.name)

    @property
    def address(self) -> str:
        """Its folder as part of a link."""
        return quote(self.folder.name)

    @functools.cached_property
    def finding(self) -> Finding:
        """What the notebook reports; empty where its file was damaged."""
        return Finding.from_facts(self.facts)

    @property
    def model(self) -> str:
        """The model's name, or a dash."""
        return self.finding.model or "–"

    @property
    def has_notebook(self) -> bool:
        """Whether it left a notebook: then it has a page with code as well."""
        return (self.folder / "notebook.ipynb").exists()

    @property
    def tables(self) -> list[str]:
        """Names of the tables that it left."""
        return [name for name in TABLES if (self.folder / f"{name}.csv").exists()]

    def group(self, name: str) -> Mapping[str, Any]:
        """A table among the facts, such as settings; empty if there is none."""
        group = self.facts.get(name)
        return group if isinstance(group, Mapping) else {}


def count_runs(runs: Sequence[Finished]) -> str:
    """How many runs there are, in words."""
    return f"{len(runs)} run" if len(runs) == 1 else f"{len(runs)} runs"


def read_runs(folder: Path | str) -> list[Finished]:
    """All runs of a results folder, those that failed last.

    Args:
        folder: The results folder of a study.

    Returns:
        The runs: those that succeeded first, then by kind of concept, then in the study's order.

    Raises:
        LocogenError: There is no such folder, or it holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LocogenError(
            f"there is no folder {folder}: make results first with `locogen run STUDY.toml`"
        )
    runs = []
    for place in sorted(folder.iterdir()):
        # A link could lead out of the results folder; hidden folders are half-made runs.
        is_own_folder = place.is_dir() and not place.is_symlink()
        if is_own_folder and not place.name.startswith(".") and _is_run(place):
            runs.append(read_run(place))
    if not runs:
        inner = folder / "results"  # where a single question keeps them
        remedy = "make results first with `locogen run STUDY.toml`"
        if inner.is_dir():
            remedy = f"they are in {inner}"
        raise LocogenError(f"{folder} holds no run: {remedy}")

    order = read_study_facts(folder).get("runs", [])

    def rank(run: Finished) -> tuple[bool, int, int, str, str]:
        return (
            bool(run.error),
            _position(run.facts.get("kind"), KINDS),
            _position(run.folder.name, order),
            str(run.facts.get("finished", "")),
            run.folder.name,
        )

    return sorted(runs, key=rank)


def _position(value: Any, order: Sequence[Any]) -> int:
    """The place of a value in an order; what is not in it comes last."""
    return order.index(value) if value in order else len(order)


def read_study_facts(folder: Path) -> Mapping[str, Any]:
    """What a results folder says about its study: title, order of the runs, base folder."""
    return read_record(folder / "study.json").facts


def read_run(folder: Path) -> Finished:
    """What a run left; with missing or unreadable files it comes back as failed."""
    try:
        return _read(folder)
    except Exception as error:  # whatever it is, the other runs must still be shown
        return damaged(folder, {}, error)


def damaged(folder: Path, facts: Mapping[str, Any], error: Exception) -> Finished:
    """A run that cannot be shown, with the reason; of its facts, only names are used."""
    usable = pick(facts, "title", "model", "concepts", "kind", "notebook")
    return Finished(folder, usable, f"its results are damaged: {reason_of(error)}")


def pick(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of the facts that have these names, in the order of the names."""
    return {name: facts[name] for name in names if name in facts}


def reason_of(error: Exception) -> str:
    """An error as one line of text that a page can hold."""
    text = f"{type(error).__name__}: {error}".encode("utf-8", errors="replace").decode("utf-8")
    return " ".join(text.split())


def _read(folder: Path) -> Finished:
    # `lexists`: a broken link of that name is damage, not an unfinished run.
    if os.path.lexists(folder / "result.json"):
        return _read_result(folder, read_record(folder / "result.json"))
    if not os.path.lexists(folder / "error.json"):
        return Finished(folder, {}, "unfinished: it was stopped, or is still running")

    record = read_record(folder / "error.json")
    error = record.facts.get("error") or record.damage or "its error was not recorded"
    return Finished(folder, record.facts, error, cell=record.facts.get("cell"))


def _read_result(folder: Path, record: Record) -> Finished:
    facts = record.facts
    if record.damage:
        return Finished(folder, facts, record.damage)
    if "error" in facts:
        return Finished(folder, {}, facts["error"])
    # A notebook that localizes nothing, such as an edit: only its finding is listed.
    if not facts.get("carriers") and not (folder / "effects.csv").exists():
        return Finished(folder, facts)

    try:
        effects = read_effects(folder / "effects.csv")
        carriers = Finding.from_facts(facts).carriers
        rows = findings(effects, carriers)
    except Exception as error:  # pandas raises errors of many kinds
        return Finished(folder, facts, f"its results cannot be read: {reason_of(error)}")
    return Finished(folder, facts, "", effects, carriers, rows)


def _is_run(folder: Path) -> bool:
    """Whether a folder has a file of a run; one that may not be opened could be a run."""
    with contextlib.suppress(PermissionError):
        names = ("result.json", "error.json", "notebook.ipynb")
        return any(os.path.lexists(folder / name) for name in names)
    return True


def read_table(path: Path) -> pd.DataFrame:
    """A run's CSV. Only an empty cell is missing: a concept may be called "NA" or "1984"."""
    import pandas as pd

    text: Any = dict.fromkeys(TEXTS, str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""], encoding=ENCODING)


def read_effects(path: Path) -> pd.DataFrame:
    """A run's table of effects, checked: plots may rely on its columns and on finite numbers.

    Args:
        path: `effects.csv`.

    Returns:
        The table.

    Raises:
        ValueError: A column is missing or has wrong values; also if pandas cannot read the file.
    """
    table = read_table(path)
    for name in _NEEDED:
        if name not in table:
            raise ValueError(f"{path.name} has no column {name}")
    if len(table) > _MOST_ROWS:
        raise ValueError(
            f"{path.name} has {len(table)} rows, and more than {_MOST_ROWS} are not shown"
        )
    for name in _NUMBERS:
        if name in table:
            _check_numbers(table[name], name)

    windows: Any = table[table["axis"] == "layer"]
    if "n" in windows:
        # A search that does not look at every window says so by a row without pictures.
        windows = windows[windows["n"] != 0]
    for name in _NEEDED:
        if windows[name].isna().any():
            raise ValueError(f"{path.name} has a window without {name}")
    return table


def _check_numbers(column: Any, name: str) -> None:
    """Raise `ValueError` unless every value that is present is a number that can be drawn."""
    import pandas as pd

    present: Any = pd.to_numeric(column.dropna())
    numbers = present.astype(float)  # (rows with a value,)
    # "True" and "False" are read as booleans, which count as 1 and 0.
    if pd.api.types.is_bool_dtype(column) or not (numbers.abs() <= _LARGEST).all():
        raise ValueError(f"the column {name} has a value that is not a number up to {_LARGEST:.0e}")
    if name in _WHOLE_NUMBERS and not ((numbers >= 0) & (numbers == numbers.round())).all():
        raise ValueError(f"the column {name} has a value that is not a whole number from 0 up")
