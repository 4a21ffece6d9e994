"""What a study asks for: from a TOML file to a list of runs, all checked, no kernel started.

    title = "Where two models keep styles"
    notebook = "localize"               # of locogen's notebooks, or a path from here, such as "mine.ipynb"
    models = ["mini", "./my-model"]     # names, hub ids, or folders from here
    concepts = ["mini/neon", "mini/van-gogh"]
    [grid]                              # parameters of the notebook, each with the values to try
    window = [1, 2]
    [defaults]                          # parameters that are the same in every run
    seeds = 4
    [[exclude]]                         # runs for which all of this is true are left out
    model = "./my-model"
    window = 1

Runs are the product of the lists: `notebooks`, `models`, `concepts` and the grid. A single value is written without
a list, as `notebook`, `model`, `concept`. Tables `[[run]]` replace the product: each has its own parameters and lists,
and takes from the top of the file what it does not set itself:

    [[run]]
    concepts = ["mini/neon", "mini/van-gogh"]
    [[run]]
    notebook = "edit"
    name = "edit-neon"                  # its folder; if left out, it is called by title or concept
    title = "neon, edited away"
    concept = "mini/neon"
    grid.ridge = [0.01, 0.1]

Results go to a folder next to the study, of the same name (reports/mini.toml: reports/mini/), each run to its own
folder there. Values that come from a list are part of the folders' names, so that a list can grow and no finished run
has to be repeated. A notebook gets those lists and defaults whose parameters it has; at least one notebook must have
each of them.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locogen.catalog import concept, model_entries, read_toml
from locogen.errors import LocogenError, unknown
from locogen.files import check_place, load_json
from locogen.studies.keys import circumstances, commits, entry_named, hashed, run_key
from locogen.studies.notebooks import (
    ARRANGED,
    check_parameters,
    defaults_of,
    notebook_file,
    parameters_of,
    plain,
)

_LISTS = {"notebooks": "notebook", "models": "model", "concepts": "concept"}
# Keys of a `[[run]]` that are not parameters of its notebook.
_NOT_PARAMETERS = ("title", "name", "notebook", "grid", *_LISTS)
_TOP_KEYS = ("title", "results", "defaults", "grid", "exclude", "run", *_LISTS, *_LISTS.values())
_RESERVED = ("con", "prn", "aux", "nul", "store")  # Windows' device names, and our own folder


@dataclass(frozen=True)
class Planned:
    """One run: the notebook, its parameters, and the folder that it becomes.

    Attributes:
        slug: The folder's name, by which a person refers to the run.
        title: What the run is called on pages.
        subject: The name of its concept or prompt; else its title.
        notebook: What is executed.
        parameters: Name → value, in plain JSON types.
        base: The study's own folder: paths among the parameters start there.
        folder: Where the run is published.
        key: The hash of everything that the result depends on.
        commits: Of weights from the hub, as this machine has them.
    """

    slug: str
    title: str
    subject: str
    notebook: Path
    parameters: Mapping[str, Any]
    base: Path
    folder: Path
    key: str = field(repr=False)
    commits: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def state(self) -> str:
        """`done` or `failed` (and still valid), `outdated` (done or failed otherwise) or `new`."""
        for name, state in (("result.json", "done"), ("error.json", "failed")):
            if (self.folder / name).is_file():
                record = load_json(self.folder / name)
                is_valid = record.get("key") == self.key and not self._has_other_weights(record)
                return state if is_valid else "outdated"
        return "new"

    def _has_other_weights(self, record: Mapping[str, Any]) -> bool:
        """Whether the hub has moved on since a result was made.

        Weights that only one of the two knows count as the same: the run may have fetched them
        itself, and they may be gone from the cache since.
        """
        before = record.get("commits")
        if not isinstance(before, Mapping):
            return False
        return any(before.get(name, commit) != commit for name, commit in self.commits.items())

    def value(self, name: str) -> Any:
        """A parameter as the notebook will have it: the study's value, or its default."""
        return {**defaults_of(self.notebook), **self.parameters}.get(name)


@dataclass(frozen=True)
class _Axis:
    """The values that one parameter takes in a product."""

    values: Sequence[Any] = ()
    is_list: bool = False  # written as a list, even of one value: it is then part of the name


@dataclass(frozen=True)
class _Row:
    """One combination of a `[[run]]` and the lists, before it has a slug."""

    notebook: Path
    values: dict[str, Any]
    name: str
    title: str
    marks: tuple[str, ...]  # what the lists chose, in words


def read_study(path: str | Path) -> tuple[str, Path, tuple[Planned, ...]]:
    """Read and check a study; no kernel is started.

    Args:
        path: The TOML file.

    Returns:
        The study's title, its results folder, and its runs in the order of the file.

    Raises:
        LocogenError: Something in the file is wrong, or names what does not exist.
    """
    path = Path(path).absolute()
    base = path.parent
    study = read_toml(path)
    _check_form(study, path)

    # A study without tables [[run]] is one run that takes everything from the top.
    rows: list[_Row] = []
    for number, block in enumerate(study.get("run") or [{}], 1):
        try:
            rows += _rows(study, block, base)
        except LocogenError as error:
            raise LocogenError(f"{path}: run {number}: {error}") from None
    _check_top_parameters(study, rows, path)
    _check_subjects(rows, path)
    rows = _without_excluded(rows, study.get("exclude", []), path)

    results = base / study.get("results", path.stem)
    common = circumstances()
    runs: list[Planned] = []
    for slug, row in zip(_slugs(rows, path), rows, strict=True):
        run = Planned(
            slug=slug,
            title=_title(row, base),
            subject=_subject(row.values, base) or row.title or row.name,
            notebook=row.notebook,
            parameters=row.values,
            base=base,
            folder=results / slug,
            key=run_key(row.notebook, row.values, base, common),
            commits=commits(row.notebook, row.values),
        )
        check_place(run.folder)
        runs.append(run)
    return str(study.get("title", path.stem)), results, tuple(runs)


def _check_form(study: Mapping[str, Any], path: Path) -> None:
    """Raise `LocogenError` where the file has other keys or types than a study."""
    for key in study:
        if key not in _TOP_KEYS:
            raise LocogenError(f"{path}: {unknown('key', key, _TOP_KEYS)}")
    results = study.get("results", "")
    if not isinstance(results, str):
        raise LocogenError(
            f"{path}: results is {results!r}: "
            'give a folder, seen from the study\'s own, such as results = "out"'
        )
    for name in ("defaults", "grid"):
        if not isinstance(study.get(name, {}), dict):
            raise LocogenError(f"{path}: {name} is not a table: begin it with a line [{name}]")
    for name in ("exclude", "run"):
        if not _is_list_of_tables(study.get(name, [])):
            consequence = "has no runs: " if name == "run" else ""
            raise LocogenError(
                f"{path} {consequence}{name} is not a list of tables: "
                f"begin each with a line [[{name}]]"
            )
    if not study.get("run") and not any(name in study for name in (*_LISTS, "concept", "grid")):
        raise LocogenError(
            f'{path} has no runs: add some, each a line [[run]] and a line concept = "…"'
        )


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(table, dict) for table in value)


# --- the product ---------------------------------------------------------------------------------


def _rows(study: Mapping[str, Any], block: Mapping[str, Any], base: Path) -> Iterator[_Row]:
    """Every combination of the lists that a `[[run]]` has or takes from the top."""
    # What the run's own table sets: it wins over all lists and defaults.
    fixed: dict[str, Any] = {}
    for name, value in block.items():
        if name not in _NOT_PARAMETERS:
            fixed[name] = plain(value)

    notebooks = _axis("notebook", block, study) or _Axis(["localize"])
    for name in notebooks.values:
        notebook = notebook_file(str(name), base)
        valid = parameters_of(notebook)
        defaults: dict[str, Any] = {}
        for parameter, value in study.get("defaults", {}).items():
            if parameter in valid:
                defaults[parameter] = plain(value)

        axes = _axes_of(study, block, notebook, fixed)
        for combination in itertools.product(*(axis.values for axis in axes.values())):
            choice = {name: plain(v) for name, v in zip(axes, combination, strict=True)}
            values = {**defaults, **choice, **fixed}
            check_parameters(values, notebook)
            listed = [parameter for parameter, axis in axes.items() if axis.is_list]
            yield _named_row(block, notebook, values, listed, notebooks.is_list)


def _axes_of(
    study: Mapping[str, Any],
    block: Mapping[str, Any],
    notebook: Path,
    fixed: Mapping[str, Any],
) -> dict[str, _Axis]:
    """The parameters that vary in a `[[run]]`: model, concept, and those of the grids."""
    own_grid = block.get("grid", {})
    if not isinstance(own_grid, dict):
        raise LocogenError("grid is not a table: write grid.seeds = [2, 4]")

    axes: dict[str, _Axis] = {}
    own_names = set(own_grid)  # what the run's own table says, not the top of the file
    for name in ("model", "concept"):
        axis = _axis(name, block, study)
        if axis is not None:
            axes[name] = axis
        if name in block or f"{name}s" in block:
            own_names.add(name)
    for name, values in {**study.get("grid", {}), **own_grid}.items():
        axes[name] = _Axis(_checked_list(name, values), is_list=True)

    # What stands at the top is for those notebooks that have such a parameter. What the run's own
    # table says must reach its notebook, or else be reported as a mistake.
    valid = parameters_of(notebook)
    used: dict[str, _Axis] = {}
    for name, axis in axes.items():
        if name not in fixed and (name in valid or name in own_names):
            used[name] = axis
    return used


def _axis(name: str, block: Mapping[str, Any], study: Mapping[str, Any]) -> _Axis | None:
    """The values of `name`, or of its plural, from the run's table or else from the top."""
    plural = f"{name}s"
    for table in (block, study):
        if name in table and plural in table:
            raise LocogenError(f"there are both {name} and {plural}: keep one")
        if name in table:
            return _Axis([table[name]])
        if plural in table:
            return _Axis(_checked_list(plural, table[plural]), is_list=True)
    return None


def _checked_list(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise LocogenError(f"{name} is {values!r}: give a list of values, such as [1, 2]")
    # By hash, since 1 and true are equal for Python, and lists have no hash of their own.
    if len({hashed(value) for value in values}) < len(values):
        raise LocogenError(f"{name} has a value twice: take one out")
    return values


def _named_row(
    block: Mapping[str, Any],
    notebook: Path,
    values: dict[str, Any],
    listed: Sequence[str],
    many_notebooks: bool,
) -> _Row:
    """A combination with its name: notebook, model, concept or own name, and the grid's values.

    Only what is written as a list is named, so that a value more renames no other run.
    """
    title = str(block.get("title") or "")
    own_name = str(block.get("name") or title)
    before: list[str] = []
    if many_notebooks:
        before.append(notebook.stem)
    if "model" in listed:
        before.append(str(values["model"]))
    after: list[str] = []
    if "concept" in listed and own_name:
        after.append(_short_subject(values))
    for name in listed:
        if name not in ("model", "concept"):
            after.append(f"{name} {values[name]}")
    name = " ".join([*before, own_name or _short_subject(values), *after])
    return _Row(notebook, values, name, title, (*before, *after))


def _short_subject(values: Mapping[str, Any]) -> str:
    """The name of a run without its own: its prompt, or its concept without the model's prefix."""
    id = str(values.get("prompt") or values.get("concept") or "run")
    model = values.get("model")
    entry = entry_named(model)
    return id.removeprefix(f"{entry.concepts if entry else model}/")


def _title(row: _Row, base: Path) -> str:
    """What a run is called on pages: its own title or its concept, and what the lists chose."""
    title = row.title or _subject(row.values, base)
    return ", ".join([title, *row.marks]) if title else row.name


def _subject(values: Mapping[str, Any], base: Path) -> str:
    """The name of a run's prompt or concept. Raises `LocogenError` for an unknown concept."""
    if values.get("prompt") or not values.get("concept"):
        return str(values.get("prompt", ""))
    file = values.get("concepts_file")
    return concept(values["concept"], file=base / file if file else None).name


# --- checks --------------------------------------------------------------------------------------


def _check_top_parameters(study: Mapping[str, Any], rows: Sequence[_Row], path: Path) -> None:
    """Raise `LocogenError` for a parameter at the top that none of the notebooks has."""
    notebooks = {row.notebook for row in rows}
    # The notebook at the top counts even where every run has another one.
    axis = _axis("notebook", {}, study)
    if axis is not None:
        notebooks |= {notebook_file(str(name), path.parent) for name in axis.values}
    valid: set[str] = set()
    for notebook in notebooks:
        valid |= set(parameters_of(notebook))

    names = [*study.get("defaults", {}), *study.get("grid", {})]
    for plural, name in _LISTS.items():
        if name != "notebook" and (plural in study or name in study):
            names.append(name)
    for name in names:
        if name in ARRANGED:
            raise LocogenError(f"{path}: {name} is set by the study itself: leave it out")
        if name not in valid:
            raise LocogenError(f"{path}: {unknown('parameter', name, valid - set(ARRANGED))}")


def _check_subjects(rows: Sequence[_Row], path: Path) -> None:
    """Raise `LocogenError` for a model or a concept that does not exist."""
    for row in rows:
        model = row.values.get("model")
        if isinstance(model, str):
            _check_model(model, path)
        try:
            _subject(row.values, path.parent)
        except LocogenError as error:
            raise LocogenError(f"{path}: {error}") from None


def _check_model(model: str, path: Path) -> None:
    names = [entry.name for entry in model_entries()]
    # With a slash inside it may be an id of the hub, which only the kernel can look up.
    if "/" not in model and model not in names:
        raise LocogenError(f"{path}: {unknown('model', model, names)}")
    if model.startswith((".", "/")) and not (path.parent / model).is_dir():
        raise LocogenError(f"{path}: there is no folder {path.parent / model} to load a model from")


def _without_excluded(
    rows: list[_Row], rules: Sequence[Mapping[str, Any]], path: Path
) -> list[_Row]:
    """The rows that no `[[exclude]]` leaves out; one that leaves out none, or all, is a mistake."""
    row_values: list[dict[str, Any]] = []
    for row in rows:
        defaults = defaults_of(row.notebook)
        row_values.append({"notebook": row.notebook.stem, **defaults, **row.values})
    names = {name for values in row_values for name in values}

    excluded: set[int] = set()  # positions among the rows
    for number, rule in enumerate(rules, 1):
        for name in rule:
            if name not in names:
                raise LocogenError(f"{path}: exclude {number}: {unknown('key', name, names)}")
        matching = {i for i, values in enumerate(row_values) if _matches(values, rule)}
        # A rule without conditions matches every run: it was surely not meant so.
        if not rule or not matching:
            raise LocogenError(
                f"{path}: exclude {number} leaves nothing out: no run has {rule or 'no condition'}"
            )
        excluded |= matching
    if len(excluded) == len(rows):
        raise LocogenError(f"{path} has no runs: its exclusions leave out all {len(rows)}")
    return [row for i, row in enumerate(rows) if i not in excluded]


def _matches(values: Mapping[str, Any], rule: Mapping[str, Any]) -> bool:
    """Whether all of a rule is true of a run; a list in it means any of these."""
    for name, condition in rule.items():
        accepted = condition if isinstance(condition, list) else [condition]
        if values.get(name) not in accepted:
            return False
    return True


# --- names ---------------------------------------------------------------------------------------


def slugify(name: str) -> str:
    """A folder name that is safe on every system: lower-case letters of any script, digits, hyphens."""
    text = unicodedata.normalize("NFKC", name).lower()
    words = "".join(c if c.isalnum() else " " for c in text).split()
    slug = "-".join(words)[:60].rstrip("-")
    while len(slug.encode()) > 120:  # letters of other scripts take several bytes
        slug = slug[:-1]
    is_reserved = slug in _RESERVED or re.fullmatch(r"(com|lpt)\d", slug)
    if is_reserved or not slug:
        return f"{slug}-{hashed(name)[:6]}".lstrip("-")
    return slug


def _slugs(rows: Sequence[_Row], path: Path) -> list[str]:
    """A slug for each run; of several that are alike, the first keeps it, others get a short hash."""
    slugs: list[str] = []
    contents: set[str] = set()
    for number, row in enumerate(rows, 1):
        content = hashed([row.name, row.notebook, row.values])
        if content in contents:
            raise LocogenError(
                f"{path}: run {number} ({row.name}) is there twice: "
                "change a parameter or take it out"
            )
        contents.add(content)
        slug = slugify(row.name)
        # The hash depends on the run alone, never on its place in the file. Once is enough, unless
        # another run happens to be called by this very hash.
        while slug in slugs:
            slug = f"{slug}-{hashed([row.name, row.notebook.stem, row.values])[:6]}"
        slugs.append(slug)
    return slugs
