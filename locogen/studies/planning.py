"""What a study asks for: a TOML file to a list of runs, all of it checked, no kernel started.

    title = "Where two models keep styles"
    notebook = "localize"               # of locogen's notebooks, or a path from here, such as "mine.ipynb"
    models = ["mini", "./my-model"]     # names, hub ids, or folders from here
    concepts = ["mini/neon", "mini/van-gogh"]
    [grid]                              # parameters of the notebook, each with the values to try
    window = [1, 2]
    [defaults]                          # parameters that are the same in every run
    seeds = 4
    [[exclude]]                         # runs of which all of this is true are left out
    model = "./my-model"
    window = 1

Runs are the product of the lists: `notebooks`, `models`, `concepts` and the grid; one value that is no list is written
`notebook`, `model`, `concept`. Tables `[[run]]` replace the product: each is one of its own, with parameters and lists
of its own, and takes from the top what it does not say:

    [[run]]
    concepts = ["mini/neon", "mini/van-gogh"]
    [[run]]
    notebook = "edit"
    name = "edit-neon"                  # its folder; otherwise that is called by title or concept
    title = "neon, edited away"
    concept = "mini/neon"
    grid.ridge = [0.01, 0.1]

Results go to the folder of the study's name beside it (reports/mini.toml: reports/mini/), each run to one of its own.
What is written as a list is in the folders' names, so that a list can grow without a run being done again. A notebook
is given those lists and defaults whose parameters it has; one of them must have each.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locogen.catalog import concept, model_entries, read_toml
from locogen.errors import LocogenError, unknown
from locogen.files import check_place, load_json
from locogen.studies.keys import circumstances, commits, hashed, run_key
from locogen.studies.notebooks import (
    ARRANGED,
    check_parameters,
    defaults_of,
    notebook_file,
    parameters_of,
    plain,
)

_ABOUT = ("title", "name")  # keys of a run that are not parameters
_LISTS = {"notebooks": "notebook", "models": "model", "concepts": "concept"}
_RESERVED = ("con", "prn", "aux", "nul", "store")  # Windows' device names, and our own folder


@dataclass(frozen=True)
class Planned:
    """One run: the notebook, its parameters in plain JSON types, and the folder it becomes."""

    slug: str
    title: str
    subject: str  # the name of its concept or prompt; else its title
    notebook: Path
    parameters: Mapping[str, Any]
    base: Path  # the study's own folder: paths among the parameters start there
    folder: Path
    key: str = field(repr=False)
    commits: Mapping[str, str] = field(
        default_factory=dict, repr=False
    )  # of hub weights, as this machine has them

    @property
    def state(self) -> str:
        """`done` or `failed` (and still valid), `outdated` (done or failed otherwise) or `new`."""
        for name, state in (("result.json", "done"), ("error.json", "failed")):
            if (self.folder / name).is_file():
                told = load_json(self.folder / name)
                return (
                    state if told.get("key") == self.key and not self._moved(told) else "outdated"
                )
        return "new"

    def _moved(self, told: Mapping[str, Any]) -> bool:
        """Whether the hub's weights are others than those of a result; what one of them does not know is the same."""
        before = told.get("commits")
        before = before if isinstance(before, Mapping) else {}
        return any(before.get(name, commit) != commit for name, commit in self.commits.items())

    def value(self, name: str) -> Any:
        """A parameter as the notebook will have it: given, or its default."""
        return {**defaults_of(self.notebook), **self.parameters}.get(name)


@dataclass(frozen=True)
class _Row:
    """One combination of a `[[run]]` and the lists: its notebook as asked for, and what is in its name."""

    notebook: Path
    values: dict[str, Any]
    name: str
    title: str
    marks: tuple[str, ...]


def read_study(path: str | Path) -> tuple[str, Path, tuple[Planned, ...]]:
    """A study's title, results folder and runs, all of it checked; starts no kernel."""
    path = Path(path).absolute()
    study = read_toml(path)
    blocks = _blocks(study, path)
    rows: list[_Row] = []
    for number, block in enumerate(blocks, 1):
        try:
            rows += _rows(study, block, path.parent)
        except LocogenError as error:
            raise LocogenError(f"{path}: run {number}: {error}") from None
    _check_common(study, rows, path)
    rows = _kept(rows, study.get("exclude", []), path)
    results = path.parent / study.get("results", path.stem)
    common = circumstances()
    runs = tuple(
        Planned(
            slug,
            _title(row, path.parent),
            _called(row.values, path.parent) or row.title or row.name,
            row.notebook,
            row.values,
            path.parent,
            results / slug,
            run_key(row.notebook, row.values, path.parent, common),
            commits(row.notebook, row.values),
        )
        for slug, row in zip(_slugs(rows, path), rows, strict=True)
    )
    for run in runs:
        check_place(run.folder)
    return str(study.get("title", path.stem)), results, runs


def _blocks(study: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """The tables `[[run]]`, or one that takes everything from the top; the form of the rest is looked at too."""
    known = ("title", "results", "defaults", "grid", "exclude", "run", *_LISTS, *_LISTS.values())
    for key in study:
        if key not in known:
            raise LocogenError(f"{path}: {unknown('key', key, known)}")
    if not isinstance(study.get("results", ""), str):
        raise LocogenError(
            f'{path}: results is {study["results"]!r}: give a folder from here, such as results = "out"'
        )
    for name in ("defaults", "grid"):
        if not isinstance(study.get(name, {}), dict):
            raise LocogenError(f"{path}: {name} is not a table: begin it with a line [{name}]")
    for name in ("exclude", "run"):
        tables = study.get(name, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            none = "has no runs: " if name == "run" else ""
            raise LocogenError(
                f"{path} {none}{name} is not a list of tables: begin each with a line [[{name}]]"
            )
    if not study.get("run") and not any(name in study for name in (*_LISTS, "concept", "grid")):
        raise LocogenError(
            f'{path} has no runs: add some, each a line [[run]] and a line concept = "…"'
        )
    return list(study.get("run", [])) or [{}]


# --- the product ---------------------------------------------------------------------------------


def _rows(study: Mapping[str, Any], block: Mapping[str, Any], base: Path) -> Iterator[_Row]:
    """Every combination of the lists that a `[[run]]` has or takes from the top."""
    apart = (*_ABOUT, *_LISTS, "notebook", "grid")
    own = {name: plain(value) for name, value in block.items() if name not in apart}
    books, many_books = _axis("notebook", block, study, ["localize"])
    grid = {**study.get("grid", {}), **_table(block.get("grid", {}))}
    for book in books:
        notebook = notebook_file(str(book), base)
        valid = parameters_of(notebook)
        axes: dict[str, tuple[list[Any], bool]] = {}
        for name in ("model", "concept"):
            axes[name] = _axis(name, block, study, [])
        axes |= {name: (_listed(name, values), True) for name, values in grid.items()}
        asked = {name for name in ("model", "concept", *block.get("grid", {})) if _has(block, name)}
        used = {
            n: axis
            for n, axis in axes.items()
            if axis[0] and (n in valid or n in asked) and n not in own
        }
        common = {
            name: plain(value) for name, value in study.get("defaults", {}).items() if name in valid
        }
        for chosen in itertools.product(*(values for values, _ in used.values())):
            picked = {name: plain(value) for name, value in zip(used, chosen, strict=True)}
            values = {**common, **picked, **own}
            check_parameters(values, notebook)
            marked = [name for name, (_, many) in used.items() if many]
            yield _row(block, notebook, values, marked, many_books)


def _has(block: Mapping[str, Any], name: str) -> bool:
    """Whether a `[[run]]` itself says something of a parameter, whose notebook must know it then."""
    return name in block or f"{name}s" in block or name in block.get("grid", {})


def _axis(
    name: str, block: Mapping[str, Any], study: Mapping[str, Any], default: list[Any]
) -> tuple[list[Any], bool]:
    """The values of `name`, or of its plural, in the run's table or else at the top; and whether it is a list."""
    for table in (block, study):
        if name in table and f"{name}s" in table:
            raise LocogenError(f"there are both {name} and {name}s: keep one")
        if name in table:
            return [table[name]], False
        if f"{name}s" in table:
            return _listed(f"{name}s", table[f"{name}s"]), True
    return default, False


def _listed(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise LocogenError(f"{name} is {values!r}: give a list of values, such as [1, 2]")
    if len({hashed(value) for value in values}) < len(values):
        raise LocogenError(f"{name} has a value twice: take one out")
    return values


def _table(grid: Any) -> dict[str, Any]:
    if not isinstance(grid, dict):
        raise LocogenError("grid is not a table: write grid.seeds = [2, 4]")
    return grid


def _row(
    block: Mapping[str, Any],
    notebook: Path,
    values: dict[str, Any],
    marked: list[str],
    many_books: bool,
) -> _Row:
    """The name of a combination: notebook, model, concept or own name, and the grid's values that it has."""
    called = str(block.get("name") or block.get("title") or "")
    before = [notebook.stem] if many_books else []
    before += [str(values["model"])] if "model" in marked else []
    after = [_named(values)] if "concept" in marked and called else []
    after += [f"{name} {values[name]}" for name in marked if name not in ("model", "concept")]
    name = " ".join([*before, called or _named(values), *after])
    return _Row(notebook, values, name, str(block.get("title") or ""), (*before, *after))


def _named(values: Mapping[str, Any]) -> str:
    """What a run without a name is called after: its prompt, or its concept less the model's own prefix."""
    id = str(values.get("prompt") or values.get("concept") or "run")
    entry = next((entry for entry in model_entries() if entry.name == values.get("model")), None)
    return id.removeprefix(f"{entry.concepts if entry else values.get('model')}/")


def _title(row: _Row, base: Path) -> str:
    """What a run is called on pages: its own title or its concept, and what the lists chose."""
    called = row.title or _called(row.values, base)
    return ", ".join([called, *row.marks]) if called else row.name


def _called(values: Mapping[str, Any], base: Path) -> str:
    """The name of a run's prompt or concept. Raises `LocogenError` for a concept that is not there."""
    if values.get("prompt") or not values.get("concept"):
        return str(values.get("prompt", ""))
    own = values.get("concepts_file")
    return concept(values["concept"], file=base / own if own else None).name


# --- checks --------------------------------------------------------------------------------------


def _check_common(study: Mapping[str, Any], rows: Iterable[_Row], path: Path) -> None:
    """What stands at the top is known to one of the notebooks; models and concepts are there."""
    valid: dict[str, Any] = {}
    for notebook in {row.notebook for row in rows} | {
        notebook_file(str(b), path.parent) for b in _at_top(study)
    }:
        valid |= parameters_of(notebook)
    common = {**study.get("defaults", {}), **study.get("grid", {})}
    common |= {
        name: None
        for many, name in _LISTS.items()
        if name != "notebook" and (many in study or name in study)
    }
    for name in common:
        if name in ARRANGED:
            raise LocogenError(f"{path}: {name} is set by the study itself: leave it out")
        if name not in valid:
            raise LocogenError(f"{path}: {unknown('parameter', name, set(valid) - set(ARRANGED))}")
    known = [entry.name for entry in model_entries()]
    for row in rows:
        model = row.values.get("model")
        if isinstance(model, str) and "/" not in model and model not in known:
            raise LocogenError(f"{path}: {unknown('model', model, known)}")
        if (
            isinstance(model, str)
            and model.startswith((".", "/"))
            and not (path.parent / model).is_dir()
        ):
            raise LocogenError(
                f"{path}: there is no folder {path.parent / model} to load a model from"
            )
        try:
            _called(row.values, path.parent)
        except LocogenError as error:
            raise LocogenError(f"{path}: {error}") from None


def _at_top(study: Mapping[str, Any]) -> list[Any]:
    return _axis("notebook", {}, study, [])[0]


def _kept(rows: list[_Row], rules: list[dict[str, Any]], path: Path) -> list[_Row]:
    """The rows that no `[[exclude]]` leaves out; one that leaves out none, or all of them, is a mistake."""
    told = [
        {"notebook": row.notebook.stem, **defaults_of(row.notebook), **row.values} for row in rows
    ]
    known = {name for values in told for name in values}
    left = [True] * len(rows)
    for number, rule in enumerate(rules, 1):
        for name in rule:
            if name not in known:
                raise LocogenError(f"{path}: exclude {number}: {unknown('key', name, known)}")
        hits = [_matches(values, rule) for values in told]
        if not rule or not any(hits):
            raise LocogenError(
                f"{path}: exclude {number} leaves nothing out: no run has {rule or 'no condition'}"
            )
        left = [keep and not hit for keep, hit in zip(left, hits, strict=True)]
    if not any(left):
        raise LocogenError(f"{path} has no runs: its exclusions leave out all {len(rows)}")
    return [row for row, keep in zip(rows, left, strict=True) if keep]


def _matches(values: Mapping[str, Any], rule: Mapping[str, Any]) -> bool:
    """Whether all of a rule is true of a run; a list in it means any of these."""
    listed = {name: value if isinstance(value, list) else [value] for name, value in rule.items()}
    return all(values.get(name) in wanted for name, wanted in listed.items())


# --- names ---------------------------------------------------------------------------------------


def slugify(name: str) -> str:
    """A folder name that is safe on every system: lower-case letters of any script, digits, hyphens."""
    text = unicodedata.normalize("NFKC", name).lower()
    short = "-".join("".join(c if c.isalnum() else " " for c in text).split())[:60].rstrip("-")
    while len(short.encode()) > 120:  # letters of other scripts take several bytes
        short = short[:-1]
    reserved = short in _RESERVED or re.fullmatch(r"(com|lpt)\d", short)
    return f"{short}-{hashed(name)[:6]}".lstrip("-") if reserved or not short else short


def _slugs(rows: list[_Row], path: Path) -> list[str]:
    """A slug for each run; of several alike, the first keeps it and the others get a short hash."""
    taken: dict[str, None] = {}  # in the order of the runs
    there: set[str] = set()
    for number, row in enumerate(rows, 1):
        whole = hashed([row.name, row.notebook, row.values])
        if whole in there:
            raise LocogenError(
                f"{path}: run {number} ({row.name}) is there twice: change a parameter or take it out"
            )
        there.add(whole)
        slug = slugify(row.name)
        while slug in taken:  # once, but for the odd run that is called by another's hash
            slug = f"{slug}-{hashed([row.name, row.notebook.stem, row.values])[:6]}"
        taken[slug] = None
    return list(taken)
