"""What a study asks for: from a TOML file to a list of runs, all checked, no kernel started.

    title = "Where two models keep styles"
    notebook = "localize"               # of locogen's, or a path from here: "mine.ipynb"
    models = ["mini", "./my-model"]     # names, hub ids, or folders from here
    concepts = ["mini/neon", "mini/van-gogh"]
    [grid]                              # parameters of the notebook, each with the values to try
    window = [1, 2]
    [defaults]                          # parameters that are the same in every run
    seeds = 4
    [[exclude]]                         # runs for which all of this is true are left out
    model = "./my-model"
    window = 1

Runs are the product of the lists: `notebooks`, `models`, `concepts` and the grid. A single value is
written without a list, as `notebook`, `model`, `concept`. Tables `[[run]]` replace the product:
each has its own parameters and lists, and takes from the top of the file what it does not set
itself:

    [[run]]
    concepts = ["mini/neon", "mini/van-gogh"]
    [[run]]
    notebook = "edit"
    name = "edit-neon"                  # its folder; if left out, it is called by title or concept
    title = "neon, edited away"
    concept = "mini/neon"
    grid.ridge = [0.01, 0.1]

Results go to a folder next to the study, of the same name (reports/mini.toml: reports/mini/), each
run to its own folder there. Values that come from a list are part of the folders' names, so that a
list can grow and no finished run has to be repeated. A notebook gets those lists and defaults whose
parameters it has; at least one notebook must have each of them.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import unicodedata
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locogen.catalog import concept, concepts, model_entries, read_toml, scorer_entry
from locogen.catalog.plants import SETS, plant_entries
from locogen.errors import LocogenError, unknown
from locogen.files import check_place, load_json
from locogen.phrasings import subject_in
from locogen.plan import Concept, PromptPair, parse_ids, parse_layers, parse_names, parse_numbers
from locogen.studies.keys import (
    circumstances,
    commits,
    concept_of,
    entry_named,
    hashed,
    layers_of,
    run_key,
)
from locogen.studies.notebooks import (
    ARRANGED,
    check_parameters,
    defaults_of,
    is_shipped,
    may_be_empty,
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
            file = self.folder / name
            if not file.is_file():
                continue
            record = load_json(file)
            # The key does not hold the hub's commits: these count only where both are known.
            if record.get("key") != self.key or self._has_other_weights(record):
                return "outdated"
            return state
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
        return self.values().get(name)

    def values(self) -> dict[str, Any]:
        """All parameters as the notebook will have them."""
        return {**defaults_of(self.notebook), **self.parameters}


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

    def all_values(self) -> dict[str, Any]:
        """The values as an `[[exclude]]` sees them: with the notebook's name and its defaults."""
        return {"notebook": self.notebook.stem, **defaults_of(self.notebook), **self.values}


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
    with _at(path):
        _check_form(study)
        rows = _all_rows(study, base)
        _check_top_parameters(study, rows, base)
        _check_subjects(rows, base)
        rows = _without_excluded(rows, study.get("exclude", []))
        _check_together(rows, base)
        slugs = _slugs(rows)

    results = base / study.get("results", path.stem)
    common = circumstances()
    runs: list[Planned] = []
    for slug, row in zip(slugs, rows, strict=True):
        run = Planned(
            slug=slug,
            title=_title(row, base),
            subject=_subject(row.values, base) or row.title or row.name,
            notebook=row.notebook,
            parameters=row.values,
            base=base,
            folder=results / slug,
            key=run_key(row.notebook, row.values, base, common),
            commits=commits(row.notebook, row.values, base),
        )
        check_place(run.folder)
        runs.append(run)
    return str(study.get("title", path.stem)), results, tuple(runs)


@contextlib.contextmanager
def _at(place: object) -> Iterator[None]:
    """Put the place before the message of an error, so that no check has to know it."""
    try:
        yield
    except LocogenError as error:
        raise LocogenError(f"{place}: {error}") from None


def _check_form(study: Mapping[str, Any]) -> None:
    """Raise `LocogenError` where the file has other keys or types than a study."""
    for key in study:
        if key not in _TOP_KEYS:
            raise unknown("key", key, _TOP_KEYS)
    results = study.get("results", "")
    if not isinstance(results, str):
        raise LocogenError(
            f"results is {results!r}: "
            'give a folder, relative to the study\'s own, such as results = "out"'
        )
    for name in ("defaults", "grid"):
        if not isinstance(study.get(name, {}), dict):
            raise LocogenError(f"{name} is not a table: begin it with a line [{name}]")
    for name in ("exclude", "run"):
        _check_tables(name, study.get(name, []))
    has_lists = any(name in study for name in (*_LISTS, "concept", "grid"))
    if not has_lists and not study.get("run"):
        raise LocogenError(
            'the study has no runs: add some, each a line [[run]] and a line concept = "…"'
        )


def _check_tables(name: str, tables: Any) -> None:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise LocogenError(f"{name} is not a list of tables: begin each with a line [[{name}]]")


# --- the product ---------------------------------------------------------------------------------


def _all_rows(study: Mapping[str, Any], base: Path) -> list[_Row]:
    # A study without tables [[run]] is one run that takes everything from the top.
    blocks = study.get("run") or [{}]
    rows: list[_Row] = []
    for number, block in enumerate(blocks, 1):
        with _at(f"run {number}"):
            rows += _rows(study, block, base)
    return rows


def _rows(study: Mapping[str, Any], block: Mapping[str, Any], base: Path) -> Iterator[_Row]:
    """Every combination of the lists that a `[[run]]` has or takes from the top."""
    # What the run's own table sets wins over all lists and defaults.
    names = block.keys() - set(_NOT_PARAMETERS)
    fixed = _selected(block, names)

    notebooks = _axis("notebook", block, study) or _Axis(["localize"])
    for notebook_name in notebooks.values:
        notebook = notebook_file(str(notebook_name), base)
        defaults = _selected(study.get("defaults", {}), parameters_of(notebook))
        axes = _axes(study, block, notebook)
        for parameter in axes.keys() & fixed.keys():
            del axes[parameter]
        listed = [parameter for parameter, axis in axes.items() if axis.is_list]
        for combination in itertools.product(*(axis.values for axis in axes.values())):
            choice = plain(dict(zip(axes, combination, strict=True)))
            values = {**defaults, **choice, **fixed}
            check_parameters(values, notebook)
            yield _named_row(block, notebook, values, listed, notebooks.is_list, base)


def _selected(table: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """The entries of a table that have one of these names, in plain JSON types."""
    return {name: plain(value) for name, value in table.items() if name in names}


def _axes(study: Mapping[str, Any], block: Mapping[str, Any], notebook: Path) -> dict[str, _Axis]:
    """The parameters that vary in a `[[run]]`: model, concept, and those of the grids."""
    own_grid = block.get("grid", {})
    if not isinstance(own_grid, dict):
        raise LocogenError("grid is not a table: write grid.seeds = [2, 4]")

    # What stands at the top is for those notebooks that have such a parameter. What the run's own
    # table says must reach its notebook, or else be reported as a mistake.
    accepted = {*parameters_of(notebook), *own_grid}
    for plural, name in _LISTS.items():
        if name in block or plural in block:
            accepted.add(name)

    axes: dict[str, _Axis] = {}
    for name in ("model", "concept"):
        axis = _axis(name, block, study)
        if axis is not None:
            axes[name] = axis
    for name, values in {**study.get("grid", {}), **own_grid}.items():
        axes[name] = _Axis(_checked_list(name, values), is_list=True)
    return {name: axis for name, axis in axes.items() if name in accepted}


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
        raise LocogenError(f"{name} has a value twice: remove one of them")
    return values


def _named_row(
    block: Mapping[str, Any],
    notebook: Path,
    values: dict[str, Any],
    listed: Sequence[str],
    many_notebooks: bool,
    base: Path,
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
        after.append(_short_subject(values, base))
    for name in listed:
        if name not in ("model", "concept"):
            after.append(f"{name} {values[name]}")
    name = " ".join([*before, own_name or _short_subject(values, base), *after])
    return _Row(notebook, values, name, title, (*before, *after))


def _short_subject(values: Mapping[str, Any], base: Path) -> str:
    """The name of a run without its own: its prompt, or its concept without the model's prefix."""
    id = str(values.get("prompt") or values.get("concept") or "run")
    model = values.get("model")
    entry = entry_named(values, base)
    return id.removeprefix(f"{entry.concepts if entry else model}/")


def _title(row: _Row, base: Path) -> str:
    """What a run is called on pages: its own title or its concept, and what the lists chose."""
    title = row.title or _subject(row.values, base)
    return ", ".join([title, *row.marks]) if title else row.name


def _subject(values: Mapping[str, Any], base: Path) -> str:
    """The name of a run's prompt or concept. Raises `LocogenError` for an unknown concept."""
    subject = concept_of(values, base)
    return subject.name if subject else str(values.get("prompt", ""))


# --- checks --------------------------------------------------------------------------------------


def _check_top_parameters(study: Mapping[str, Any], rows: Sequence[_Row], base: Path) -> None:
    """Raise `LocogenError` for a parameter at the top that none of the notebooks has."""
    # The notebook at the top counts even where every run has another one.
    top = _axis("notebook", {}, study) or _Axis()
    notebooks = {notebook_file(str(name), base) for name in top.values}
    notebooks |= {row.notebook for row in rows}
    valid: set[str] = set().union(*map(parameters_of, notebooks))

    names = [*study.get("defaults", {}), *study.get("grid", {})]
    names += [name for name in ("model", "concept") if _axis(name, {}, study) is not None]
    for name in names:
        if name in ARRANGED:
            raise LocogenError(f"{name} is set by the study itself: leave it out")
        if name not in valid:
            raise unknown("parameter", name, valid - set(ARRANGED))


def _check_subjects(rows: Sequence[_Row], base: Path) -> None:
    """Raise `LocogenError` for a model or a concept that does not exist."""
    for row in rows:
        model = row.values.get("model")
        if isinstance(model, str):
            _check_model(row.values, base)
        _subject(row.values, base)
        if is_shipped(row.notebook):
            values = row.all_values()
            _check_ids(row, base)
            _check_scorer(values, base)
            _check_concept(values)


def _check_together(rows: Sequence[_Row], base: Path) -> None:
    """Raise `LocogenError` for values that do not go together, in runs that no exclusion left out.

    For leaving such runs out is what exclusions are for.
    """
    for row in rows:
        _check_layers(row, base)
        if is_shipped(row.notebook) and row.notebook.stem in _TOGETHER:
            _TOGETHER[row.notebook.stem](row.all_values(), base)


def _check_model(values: Mapping[str, Any], base: Path) -> None:
    model = values["model"]
    is_known = entry_named(values, base) is not None
    # With a slash inside it may be an id of the hub, which only the kernel can look up.
    if "/" not in model and not is_known:
        file = values.get("models_file")
        entries = model_entries(base / file if file else None)
        raise unknown("model", model, [entry.name for entry in entries])
    if not is_known and model.startswith((".", "/")) and not (base / model).is_dir():
        raise LocogenError(
            f"there is no folder {base / model} to load a model from: give a folder, a hub id or a "
            "catalog name"
        )


def _check_ids(row: _Row, base: Path) -> None:
    """Raise `LocogenError` for a file of concepts that is not in order, and for ids in a list.

    That is for no id, an unknown one, and one that comes twice.
    """
    values = row.all_values()
    parameters = parameters_of(row.notebook)
    file = _file_of("concepts_file", values, base)
    if file is not None:
        concepts(file=file)
    for name in {"ids", "other"} & parameters.keys():
        text = values[name]
        if text == "" and may_be_empty(parameters[name]):
            continue
        # That notebook takes those of the model alone, the others any of the catalog.
        model = values["model"] if row.notebook.stem == "compare_localizers" else None
        suitable = concepts(model, file, _file_of("models_file", values, base))
        ids = parse_ids(text, name, suitable.id)
        if name == "other" and len(ids) > 1:
            raise LocogenError(f"other is {text!r}: give one concept")


def _check_concept(values: Mapping[str, Any]) -> None:
    """Raise `LocogenError` where a notebook has neither a concept nor a prompt."""
    if values.get("concept") == "" and not values.get("prompt"):
        raise LocogenError("concept is '': give an id (`locogen concepts` lists them)")


def _file_of(name: str, values: Mapping[str, Any], base: Path) -> Path | None:
    file = values.get(name)
    return base / file if file else None


def _check_scorer(values: Mapping[str, Any], base: Path) -> None:
    """Raise `LocogenError` for a scorer that is neither known, nor a folder, nor a hub id."""
    scorer = values.get("scorer")
    if not isinstance(scorer, str) or scorer in ("", "mini") or "/" in scorer:
        return
    if not (base / scorer).expanduser().is_dir():
        scorer_entry(scorer)


def _check_layers(row: _Row, base: Path) -> None:
    """Raise `LocogenError` for layers, or a window, that the model does not have.

    Where its number of layers is not known here, the kernel looks.
    """
    values = row.all_values()
    count = layers_of(values, base)
    if count is None or not is_shipped(row.notebook):
        return
    if isinstance(values.get("layers"), str):
        beyond = [layer for layer in parse_layers(values["layers"]) if layer >= count]
        if beyond:
            raise LocogenError(
                f"layers {values['layers']!r}: {values['model']} has layers 0 to {count - 1}"
            )
    if values.get("window", 0) > count:
        raise LocogenError(f"window is {values['window']}: {values['model']} has {count} layers")


# --- values that depend on each other ------------------------------------------------------------


def _check_own_prompt(values: Mapping[str, Any], base: Path) -> None:
    """Of localize: a prompt and a target that make no pair."""
    prompt = values["prompt"]
    if prompt:
        pair = PromptPair(prompt, values["target"], values["text"] or None)
        Concept(prompt, values["kind"], (pair,))


def _check_subject(values: Mapping[str, Any], base: Path) -> None:
    """Of causal_trace: words for the noise that a prompt does not have."""
    subject = concept_of(values, base)
    if subject is not None:
        for pair in subject.first(values["max_prompts"]).pairs:
            subject_in(subject, pair, values["subject"])


def _check_halves(values: Mapping[str, Any], base: Path) -> None:
    """Of edit_sweep: so many prompts to choose on that not as many are left to report on."""
    subject = concept_of(values, base)
    if subject is None:
        return
    subject.halves(values["prompts"])
    # Those that should stay, as the notebook finds them.
    file = _file_of("concepts_file", values, base)
    listed = concepts(values["model"], file, _file_of("models_file", values, base))
    is_near = (listed.kind == subject.kind) & (listed.id != values["concept"])
    for id in listed[is_near].id[: values["neighbors"] or None]:
        concept(id, file).halves(values["prompts"])


def _check_steps(values: Mapping[str, Any], base: Path) -> None:
    """Of steps: too few seeds for two halves, and more steps than what they are compared with."""
    seeds = values["seeds"]
    if seeds < 2:
        raise LocogenError(
            f"seeds is {seeds}: the reference is compared with itself on other seeds, so give 2 or "
            "more"
        )
    below = ("reference", values["reference"])
    parse_numbers(values["steps"], "steps", whole=True, below=below)


def _check_widths(values: Mapping[str, Any], base: Path) -> None:
    """Of benchmark: windows that are wider than a planted model."""
    text = values["plants"]
    every = {plant.name: plant for plant in plant_entries()}
    if text in ("", *SETS):
        plants = [plant for plant in every.values() if text in ("", plant.set)]
    else:
        plants = [every[name] for name in parse_names(text, "plants", every)]
    widest = max(parse_numbers(values["windows"], "windows", whole=True))
    for plant in plants:
        if widest > plant.layers:
            raise LocogenError(
                f"windows is {values['windows']!r}: {plant.name} has {plant.layers} layers"
            )


# By notebook: what no parameter shows by itself.
_TOGETHER: Mapping[str, Callable[[Mapping[str, Any], Path], None]] = {
    "localize": _check_own_prompt,
    "causal_trace": _check_subject,
    "edit_sweep": _check_halves,
    "steps": _check_steps,
    "benchmark": _check_widths,
}


def _without_excluded(rows: list[_Row], rules: Sequence[Mapping[str, Any]]) -> list[_Row]:
    """The rows that no `[[exclude]]` leaves out; one that leaves out none, or all, is a mistake."""
    values = [row.all_values() for row in rows]
    excluded: set[int] = set()  # positions among the rows
    for number, rule in enumerate(rules, 1):
        with _at(f"exclude {number}"):
            excluded |= _matching(rule, values)
    if len(excluded) == len(rows):
        raise LocogenError(
            f"the study has no runs: its exclusions leave out all {len(rows)}, so remove one"
        )
    return [row for position, row in enumerate(rows) if position not in excluded]


def _matching(rule: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """The positions of the rows of which all of a rule is true; a list in it means any of these."""
    names: set[str] = set().union(*rows)
    matching = set(range(len(rows)))
    for name, condition in rule.items():
        if name not in names:
            raise unknown("key", name, names)
        accepted = condition if isinstance(condition, list) else [condition]
        matching = {position for position in matching if rows[position].get(name) in accepted}

    # A rule without conditions matches every run: surely it is not meant so.
    if not rule or not matching:
        raise LocogenError(
            f"it leaves nothing out: no run has {rule or 'no condition'}; change it or remove it"
        )
    return matching


# --- names ---------------------------------------------------------------------------------------


def slugify(name: str) -> str:
    """A folder name for any system: lower-case letters of any script, digits, hyphens."""
    text = unicodedata.normalize("NFKC", name).lower()
    words = "".join(c if c.isalnum() else " " for c in text).split()
    slug = "-".join(words)[:60].rstrip("-")
    while len(slug.encode()) > 120:  # letters of other scripts take several bytes
        slug = slug[:-1]
    is_reserved = slug in _RESERVED or re.fullmatch(r"(com|lpt)\d", slug)
    if is_reserved or not slug:
        return f"{slug}-{hashed(name)[:6]}".lstrip("-")
    return slug


def _slugs(rows: Sequence[_Row]) -> list[str]:
    """A slug for each run; where several are alike, all but the first get a short hash."""
    slugs: list[str] = []
    contents: set[str] = set()
    for number, row in enumerate(rows, 1):
        content = hashed([row.name, row.notebook, row.values])
        if content in contents:
            raise LocogenError(
                f"run {number} ({row.name}) is in the study twice: change a parameter or remove it"
            )
        contents.add(content)
        slug = slugify(row.name)
        # The hash depends on the run alone, never on its place in the file. Once is enough, unless
        # another run happens to be called by this very hash.
        while slug in slugs:
            slug = f"{slug}-{hashed([row.name, row.notebook.stem, row.values])[:6]}"
        slugs.append(slug)
    return slugs
