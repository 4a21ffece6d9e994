"""Concepts by their ids, and the reader of files with concepts of your own.

Such a file has the form of `concepts.toml`:

    ["my/ukiyo-e"]                         # its id
    name = "ukiyo-e"
    kind = "style"                         # style, object or fact
    prompt = "{} in the style of ukiyo-e"  # {} is filled in turn, one pair of prompts each
    target = "{}"                          # "": an empty prompt
    placebo = "{}, drawn as ukiyo-e"       # optional: a paraphrase that keeps the concept
    text = "ukiyo-e"                       # optional: what pictures are scored against
    fill = ["a house", "a boat", "a wave"]
    neighbors = ["pop art", "cubism"]      # optional: what it could be taken for (`Concept`); with
                                           # {}: whole texts, filled; or the name of such a list
    # or, instead of prompt, target, placebo and fill:
    # pairs = [{ prompt = "a wave by hokusai", target = "a wave" }]

    [neighbors]                            # optional: lists that several concepts share
    "my/prints" = ["{} in the style of hokusai", "{} in the style of hiroshige"]

>>> concept("my/ukiyo-e", file="my.toml")
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from locogen.catalog.models import PLANTED, entry_of, model_entries, model_entry, read_toml
from locogen.errors import LocogenError, unknown
from locogen.plan import KINDS, Concept, PromptPair

if TYPE_CHECKING:
    from pandas import DataFrame

_CONCEPTS = Path(__file__).resolve().parent / "concepts.toml"

# Keys of an entry, of its template, and of a pair.
_TEXTS = ("model", "name", "kind", "note", "text", "answer")
_TEMPLATE = ("prompt", "target", "placebo", "content")
_PAIR = ("prompt", "target", "text", "placebo", "content")
_LISTS = ("fill", "pairs", "neighbors")  # not texts: checked where they are read
_SHARED = "neighbors"  # the table of lists of neighbors that concepts share
_ANY = "any"  # the model of concepts that suit all models


@dataclass(frozen=True)
class _Entry:
    model: str
    concept: Concept
    note: str


def concept(id: str, file: str | Path | None = None) -> Concept:
    """Look up a concept by its id.

    Args:
        id: An id from `concepts`, such as "mini/neon".
        file: A TOML file with concepts of your own (see `locogen.catalog.concepts`), searched as
            well; None: the catalog alone.

    Returns:
        The concept, with its prompt pairs.

    Raises:
        LocogenError: For an unknown id (with near matches), or a file that is not in order (with
            its name, the entry and the remedy).

    Example:
        >>> neon = concept("mini/neon")
        >>> neon.kind, neon.pairs[0].target
        ('style', 'a picture of a dog')
    """
    entries = _all(file)
    if id not in entries:
        raise unknown("concept", id, entries)
    return entries[id].concept


def concepts(
    model: str | None = None,
    file: str | Path | None = None,
    models_file: str | Path | None = None,
) -> DataFrame:
    """List the concepts that a model can be asked about.

    Args:
        model: A name from `model_table`, a folder or a hub id; concepts are listed that suit this
            model, all of them where the catalog does not know it. None: all.
        file: A TOML file with concepts of your own (see `locogen.catalog.concepts`), listed as
            well.
        models_file: A TOML file with models of your own, one of which `model` may name.

    Returns:
        One row a concept: id, model, name, kind, pairs (the number of them) and note.

    Raises:
        LocogenError: For a name that is none of a model (with near matches), or a file that is not
            in order.

    Example:
        >>> table = concepts("mini").set_index("id")
        >>> table.loc["mini/neon", "kind"]
        'style'
    """
    import pandas as pd

    groups = None if model is None else _groups_of(model, models_file)
    rows = []
    for id, entry in _all(file).items():
        if groups is not None and entry.model not in groups:
            continue
        subject = entry.concept
        count = len(subject.pairs)
        rows.append((id, entry.model, subject.name, subject.kind, count, entry.note))
    return pd.DataFrame(rows, columns=["id", "model", "name", "kind", "pairs", "note"])


def _groups_of(model: str, models_file: str | Path | None) -> set[str] | None:
    """The groups of concepts that suit a model; None: all, if the catalog lacks the model."""
    # A hub id or a path may be that of a model in the catalog. Any other name has to be one, or one
    # of the file's.
    is_place = "/" in model or Path(model).exists()
    entry = entry_of(model) if is_place else model_entry(model, models_file)
    if entry is None:
        return None
    # A concept names one model or a group of them: "mini" and "mini-b" share theirs.
    groups = {_ANY, model, entry.name, entry.concepts}
    if entry.name.startswith(PLANTED):
        groups.add(PLANTED.rstrip("/"))
    return groups


@functools.cache
def _built_in() -> Mapping[str, _Entry]:
    return MappingProxyType(_entries(_CONCEPTS))


def _all(file: str | Path | None) -> Mapping[str, _Entry]:
    """The catalog's concepts, and those of a file."""
    if file is None or not str(file):
        return _built_in()
    entries = _entries(Path(file))
    taken = sorted(entries.keys() & _built_in().keys())
    if taken:
        raise LocogenError(
            f"{file}: the catalog has a concept {taken[0]!r} already: give yours another id"
        )
    return {**_built_in(), **entries}


def _entries(path: Path) -> dict[str, _Entry]:
    """Every concept of a file, checked; `LocogenError` names the file, the entry and the remedy."""
    entries: dict[str, _Entry] = {}
    rows = read_toml(path)
    shared = rows.pop(_SHARED, {})
    for id, row in rows.items():
        try:
            entries[id] = _entry(row, shared)
        except LocogenError as error:
            raise LocogenError(f"{path}: concept {id!r}: {error}") from None
    return entries


def _entry(row: Any, shared: Mapping[str, Any]) -> _Entry:
    if not isinstance(row, dict):
        raise LocogenError('not a table: begin it with a line such as ["my/concept"]')
    # Before all else: a misspelt key would make later messages misleading.
    _check_keys(row, (*_TEXTS, *_TEMPLATE, *_LISTS), needed=("name", "kind"))
    if row["kind"] not in KINDS:
        raise LocogenError(f"kind is {row['kind']!r}: use one of {', '.join(KINDS)}")
    model = row.get("model", _ANY)
    groups = _known_groups()
    if model not in groups:
        raise unknown("model", model, groups)
    neighbors = _neighbors(row.get("neighbors", ()), shared)
    names = tuple(name for name in neighbors if "{}" not in name)
    if "pairs" in row:
        pairs = _explicit(row)
        text = row.get("text")
    else:
        pairs = _filled(row, tuple(name for name in neighbors if "{}" in name))
        text = _fixed_text(row)
    subject = Concept(
        row["name"], row["kind"], pairs, text=text, answer=row.get("answer"), neighbors=names
    )
    return _Entry(model, subject, row.get("note", ""))


def _neighbors(value: Any, shared: Mapping[str, Any]) -> tuple[str, ...]:
    """What a concept could be taken for: names, or templates of whole texts."""
    if isinstance(value, str):
        if value not in shared:
            raise unknown("list of neighbors", value, shared)
        value = shared[value]
    if not _is_list_of(str, value):
        raise LocogenError('neighbors is not a list of texts: write neighbors = ["a dog"]')
    return tuple(value)


def _is_list_of(kind: type, value: Any) -> bool:
    """Whether a value of a file is a list, with nothing in it but values of a type."""
    return isinstance(value, list | tuple) and all(isinstance(one, kind) for one in value)


def _known_groups() -> set[str]:
    """What the key `model` of a concept may be: a model's name, or that of a group of models."""
    groups = {_ANY, PLANTED.rstrip("/")}
    for entry in model_entries():
        groups |= {entry.name, entry.concepts}
    return groups


def _check_keys(row: Mapping[str, Any], allowed: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """No key but the known ones, all the needed ones, and text wherever text belongs."""
    for key, value in row.items():
        if key not in allowed:
            raise unknown("key", key, allowed)
        if key not in _LISTS and not isinstance(value, str):
            raise LocogenError(f"{key} is {value!r}: give it a text in quotes")
    for key in needed:
        if key not in row:
            raise LocogenError(f"{key} is missing: add a line {key} = …")


def _explicit(row: Mapping[str, Any]) -> tuple[PromptPair, ...]:
    """The pairs that an entry spells out."""
    for key in (*_TEMPLATE, "fill"):
        if key in row:
            raise LocogenError(f"it has both pairs and {key}: keep one form, pairs or a template")
    pairs = row["pairs"]
    if not _is_list_of(dict, pairs):
        raise LocogenError(
            'pairs is not a list of tables: write pairs = [{ prompt = "…", target = "…" }]'
        )
    for pair in pairs:
        _check_keys(pair, _PAIR, needed=("prompt", "target"))
    return tuple(PromptPair(**pair) for pair in pairs)


def _fixed_text(row: Mapping[str, Any]) -> str | None:
    """The text that all pairs share; None where it is filled in pair by pair."""
    text = row.get("text")
    is_template = text is not None and "{}" in text
    return None if is_template else text


def _filled(row: Mapping[str, Any], neighbors: tuple[str, ...]) -> tuple[PromptPair, ...]:
    """A pair for each filling of `{}`; without `fill`, one pair: the templates as written.

    `neighbors`: templates of the texts that say what else a pair's pictures could show.
    """
    for key in ("prompt", "target"):
        if key not in row:
            raise LocogenError(f"{key} is missing: give prompt and target, or pairs")
    templates = {key: row[key] for key in _TEMPLATE if key in row}
    # A text with {} is filled in pair by pair; one without is the concept's.
    if "{}" in row.get("text", ""):
        templates["text"] = row["text"]
    for key, template in templates.items():
        _check_template(key, template, has_fill="fill" in row)
    pairs = []
    for fill in _fills(row):
        texts = {key: template.replace("{}", fill) for key, template in templates.items()}
        beside = tuple(template.replace("{}", fill) for template in neighbors)
        pairs.append(PromptPair(**texts, neighbors=beside))
    return tuple(pairs)


def _fills(row: Mapping[str, Any]) -> list[str]:
    # Without `fill` the templates have nothing to replace, and are used once.
    fills = row.get("fill", [""])
    if not fills or not _is_list_of(str, fills):
        raise LocogenError('fill is not a list of texts: write fill = ["a cat", "a dog"]')
    return fills


def _check_template(key: str, template: str, *, has_fill: bool) -> None:
    """A template and `fill` belong together: either without the other is a mistake."""
    has_place = "{}" in template
    # An empty target is the same for every prompt: there is nothing to fill in.
    needs_place = has_fill and not (key == "target" and template == "")
    if needs_place and not has_place:
        raise LocogenError(f"{key} {template!r} has no {{}} to fill: put one in, or leave fill out")
    if has_place and not has_fill:
        raise LocogenError(f'{key} {template!r} has a {{}} and there is no fill: add fill = ["…"]')
