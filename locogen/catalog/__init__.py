"""The models, scorers and concepts that locogen knows by name, and the reader of the user's own concepts.

`models.toml` and `concepts.toml` are the data; a file of one's own has the form of `concepts.toml`:

    ["my/ukiyo-e"]                                    # its id
    name = "ukiyo-e"
    kind = "style"                                    # style, object or fact
    prompt = "{} in the style of ukiyo-e"             # {} is filled in turn, one pair of prompts each
    target = "{}"                                     # "": nothing at all
    placebo = "{}, drawn as ukiyo-e"                  # optional: a paraphrase that keeps the concept
    text = "ukiyo-e"                                  # optional: what pictures are scored against
    fill = ["a house", "a boat", "a wave"]
    # or, instead of prompt, target, placebo and fill:
    # pairs = [{ prompt = "a wave by hokusai", target = "a wave" }]

>>> concept("my/ukiyo-e", file="my.toml")

Models of one's own have the form of `models.toml`; `id` (a hub id or a folder) and `family` are all they need:

    [models.my-finetune]
    id = "me/my-finetune"
    family = "StableDiffusionXLPipeline"
    window = 5                                        # what localize takes for window=None, and so on
    guidance_scale = 6.0

>>> pipe = load("my-finetune", file="my-models.toml")
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError, unknown
from locogen.files import ENCODING
from locogen.plan import KINDS, Concept, PromptPair

if TYPE_CHECKING:
    from pandas import DataFrame

_PACKAGE = Path(__file__).resolve().parent.parent
_MODELS = _PACKAGE / "catalog" / "models.toml"
_CONCEPTS = _PACKAGE / "catalog" / "concepts.toml"


@dataclass(frozen=True)
class ModelEntry:
    """What the catalog says of a model. `published`: kind → window start, 0-based in execution order."""

    name: str
    id: str
    family: str  # the name of diffusers' pipeline class
    size: int | None = None  # pixels a side
    layers: int | None = None  # that hear text
    scheduler: str = "the pipeline's own"
    window: int = 2
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    scorer: str = "clip-vit-b-16"
    concepts: str = "sd"
    license: str = "not told"
    revision: str = "main"
    mirrors: tuple[str, ...] = ()
    published: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    embedded: bool = False
    gated: bool = False
    supported: bool = True
    note: str = ""

    @property
    def folder(self) -> Path | None:
        """Where the weights are when the package holds them."""
        return mini_folder(self.name) if self.embedded else None


@dataclass(frozen=True)
class ScorerEntry:
    """What the catalog says of a scorer: a CLIP by its hub id, or in a folder of the package."""

    name: str
    id: str
    license: str
    revision: str = "main"
    folder: Path | None = None
    note: str = ""


def mini_folder(name: str = "mini") -> Path:
    """The folder of an embedded model's weights.

    That of "mini" is an ordinary diffusers pipeline folder; that of "mini-b" holds its U-Net, all other parts are
    those of "mini".
    """
    return _PACKAGE / "mini" / {"mini": "weights", "mini-b": "weights-b"}[name]


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file's content; `LocogenError` names the file and the line when it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding=ENCODING))
    except OSError as error:
        raise LocogenError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise LocogenError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise LocogenError(f"{path} is not valid TOML: {error}") from None


# --- models and scorers --------------------------------------------------------------------------


@functools.cache
def _models() -> dict[str, Any]:
    return read_toml(_MODELS)


def model_entry(name: str, file: str | Path | None = None) -> ModelEntry:
    """The catalog's entry of a model, or that of one's own TOML file; `LocogenError` with near matches for none."""
    entries = _models()["models"] | ({} if file is None else _own_models(Path(file)))
    if name not in entries:
        raise unknown("model", name, entries)
    row = dict(entries[name])
    row["mirrors"] = tuple(row.get("mirrors", ()))
    row["published"] = MappingProxyType(row.get("published", {}))
    entry = ModelEntry(name=name, **row)
    if file is not None:
        _LOADED[entry.id] = entry
    return entry


_LOADED: dict[str, ModelEntry] = {}  # entries of one's own by the place that a pipeline remembers


def _own_models(path: Path) -> dict[str, Any]:
    """The models of a file, checked; `LocogenError` names the file, the entry and the remedy."""
    known = [field.name for field in fields(ModelEntry) if field.name not in ("name", "embedded")]
    found = read_toml(path).get("models", {})
    if not found:
        raise LocogenError(
            f"{path} has no models: begin an entry with a line such as [models.my-model]"
        )
    for name, row in found.items():
        for key in row:
            if key not in known:
                raise LocogenError(f"{path}: model {name!r}: {unknown('key', key, known)}")
        missing = [key for key in ("id", "family") if not isinstance(row.get(key), str)]
        if missing:
            raise LocogenError(
                f'{path}: model {name!r}: {missing[0]} is missing: add a line {missing[0]} = "…"'
            )
        if name in _models()["models"]:
            raise LocogenError(
                f"{path}: model {name!r} is one of the catalog's own: give yours another name"
            )
    return found


def model_entries(file: str | Path | None = None) -> tuple[ModelEntry, ...]:
    """Every model of the catalog, in its order, and those of one's own TOML file."""
    names = [*_models()["models"], *(() if file is None else _own_models(Path(file)))]
    return tuple(model_entry(name, file) for name in names)


def entry_of(source: str) -> ModelEntry | None:
    """The catalog's entry of a model by the folder or hub id it was loaded from; None for a model it has not."""
    places = (
        (entry, (entry.id, *entry.mirrors, str(entry.folder or entry.id)))
        for entry in model_entries()
    )
    return next((entry for entry, known in places if source in known), None) or _LOADED.get(source)


def published_start(model: str, kind: str) -> int | None:
    """Where LocoGen's authors show concepts of that kind: a window's start, 0-based in execution order.

    `model`: its name, folder or hub id. None where nothing is published.
    """
    entry = model_entry(model) if model in _models()["models"] else entry_of(model)
    return None if entry is None else entry.published.get(kind)


def usual_settings(source: str) -> dict[str, Any]:
    """Window, steps and guidance of a model, by the folder or hub id it came from; 2, 20 and 7.5 for others."""
    found: Any = entry_of(source)
    if found is None:
        return {"window": 2, "num_inference_steps": 20, "guidance_scale": 7.5}
    return {
        name: getattr(found, name) for name in ("window", "num_inference_steps", "guidance_scale")
    }


def scorer_entry(name: str) -> ScorerEntry:
    """The catalog's entry of a scorer; `LocogenError` with near matches when there is none."""
    entries = _models()["scorers"]
    if name not in entries:
        raise unknown("scorer", name, entries)
    row = dict(entries[name])
    folder = row.pop("folder", None)
    return ScorerEntry(name=name, folder=_PACKAGE / folder if folder else None, **row)


def model_table(file: str | Path | None = None) -> DataFrame:
    """One row a model: name, supported, id, family, size, layers, defaults, scorer, license, gated.

    `file`: a TOML file with models of one's own, listed as well.
    """
    import pandas as pd

    columns = [
        "name",
        "supported",
        "id",
        "family",
        "size",
        "layers",
        "window",
        "num_inference_steps",
    ]
    columns += ["guidance_scale", "scorer", "license", "gated"]
    return pd.DataFrame(
        [{key: getattr(entry, key) for key in columns} for entry in model_entries(file)]
    )


# --- concepts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    model: str
    concept: Concept
    note: str


def concept(id: str, file: str | Path | None = None) -> Concept:
    """The concept of that id, from the catalog or from a TOML file of one's own (see the module's docstring).

    Raises `LocogenError`: with near matches when there is no such id, and with file, entry and remedy when
    the file is not in order.
    """
    entries = _all(file)
    if id not in entries:
        raise unknown("concept", id, entries)
    return entries[id].concept


def concepts(model: str | None = None, file: str | Path | None = None) -> DataFrame:
    """The concepts, one row each: id, model, name, kind, pairs (how many), note.

    With `model` (a name of `model_table`) only those it can be asked about; with `file` those of one's own
    TOML file as well. A concept without a model suits any.
    """
    import pandas as pd

    suited = None if model is None else {"any", model, model_entry(model).concepts}
    rows = [
        (
            id,
            entry.model,
            entry.concept.name,
            entry.concept.kind,
            len(entry.concept.pairs),
            entry.note,
        )
        for id, entry in _all(file).items()
        if suited is None or entry.model in suited
    ]
    return pd.DataFrame(rows, columns=["id", "model", "name", "kind", "pairs", "note"])


@functools.cache
def _built_in() -> Mapping[str, _Entry]:
    return MappingProxyType(_entries(_CONCEPTS))


def _all(file: str | Path | None) -> Mapping[str, _Entry]:
    if file is None or not str(file):
        return _built_in()
    own = _entries(Path(file))
    taken = next((id for id in own if id in _built_in()), None)
    if taken:
        raise LocogenError(
            f"{file}: concept {taken!r} is one of the catalog's own: give yours another id"
        )
    return {**_built_in(), **own}


def _entries(path: Path) -> dict[str, _Entry]:
    """Every concept of a file, checked; `LocogenError` names the file, the entry and the remedy."""
    found: dict[str, _Entry] = {}
    for id, row in read_toml(path).items():
        try:
            found[id] = _entry(row)
        except LocogenError as error:
            raise LocogenError(f"{path}: concept {id!r}: {error}") from None
    return found


_TEXTS = ("model", "name", "kind", "note", "text", "answer")
_TEMPLATE = ("prompt", "target", "placebo")
_PAIR = ("prompt", "target", "text", "placebo")


def _entry(row: Any) -> _Entry:
    if not isinstance(row, dict):
        raise LocogenError('not a table: begin it with a line such as ["my/concept"]')
    _check_keys(row, (*_TEXTS, *_TEMPLATE, "fill", "pairs"), needed=("name", "kind"))
    if row["kind"] not in KINDS:
        raise LocogenError(f"kind is {row['kind']!r}: take one of {', '.join(KINDS)}")
    model = row.get("model", "any")
    groups = {
        "any",
        *(entry["concepts"] for entry in _models()["models"].values()),
        *_models()["models"],
    }
    if model not in groups:
        raise unknown("model", model, groups)
    if "pairs" in row:
        pairs, text = _explicit(row), row.get("text")
    else:
        pairs, text = _filled(row), _fixed_text(row)
    found = Concept(row["name"], row["kind"], pairs, text=text, answer=row.get("answer"))
    return _Entry(model, found, row.get("note", ""))


def _check_keys(row: Mapping[str, Any], known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """No key but the known ones, all the needed ones, and text wherever text belongs."""
    for key, value in row.items():
        if key not in known:
            raise unknown("key", key, known)
        if key not in ("fill", "pairs") and not isinstance(value, str):
            raise LocogenError(f"{key} is {value!r}: give it a text in quotes")
    for key in needed:
        if key not in row:
            raise LocogenError(f"{key} is missing: add a line {key} = …")


def _explicit(row: Mapping[str, Any]) -> tuple[PromptPair, ...]:
    clash = next((key for key in (*_TEMPLATE, "fill") if key in row), None)
    if clash:
        raise LocogenError(f"it has both pairs and {clash}: keep one form, pairs or a template")
    pairs = row["pairs"]
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise LocogenError(
            'pairs is not a list of tables: write pairs = [{ prompt = "…", target = "…" }]'
        )
    for pair in pairs:
        _check_keys(pair, _PAIR, needed=("prompt", "target"))
    return tuple(PromptPair(**pair) for pair in pairs)


def _fixed_text(row: Mapping[str, Any]) -> str | None:
    """The text that all pairs share: none when it is filled in pair by pair."""
    return None if "{}" in row.get("text", "") else row.get("text")


def _filled(row: Mapping[str, Any]) -> tuple[PromptPair, ...]:
    """A pair for each filling of `{}`; without `fill` the prompt is taken as it is."""
    for key in ("prompt", "target"):
        if key not in row:
            raise LocogenError(f"{key} is missing: give prompt and target, or pairs")
    templates = {key: row[key] for key in _TEMPLATE if key in row}
    if _fixed_text(row) is None and "text" in row:
        templates["text"] = row["text"]
    fills = row.get("fill", [""])
    if not isinstance(fills, list) or not fills or not all(isinstance(fill, str) for fill in fills):
        raise LocogenError('fill is not a list of texts: write fill = ["a cat", "a dog"]')
    for key, template in templates.items():
        is_empty_target = key == "target" and not template  # the same nothing for each prompt
        if "fill" in row and "{}" not in template and not is_empty_target:
            raise LocogenError(
                f"{key} {template!r} has no {{}} to fill: put one in, or leave fill out"
            )
        if "fill" not in row and "{}" in template:
            raise LocogenError(
                f'{key} {template!r} has a {{}} and there is no fill: add fill = ["…"]'
            )
    return tuple(
        PromptPair(**{key: template.replace("{}", fill) for key, template in templates.items()})
        for fill in fills
    )
