"""Models and scorers by name, and the defaults that suit each model.

A file with models of your own has the form of `models.toml`; `id` (a hub id or a folder) and
`family` are all that an entry needs:

    [models.my-finetune]
    id = "me/my-finetune"
    family = "StableDiffusionXLPipeline"
    window = 5                                        # the default of localize, and so on
    guidance_scale = 6.0

>>> pipe = load("my-finetune", file="my-models.toml")

A folder may be given from the working folder, or from where the file is. A study takes the file as
the parameter `models_file`.
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

if TYPE_CHECKING:
    from pandas import DataFrame

_PACKAGE = Path(__file__).resolve().parent.parent
_MODELS = _PACKAGE / "catalog" / "models.toml"
PLANTED = "planted/"  # what the names of planted models begin with
_COLUMNS = (
    *("name", "supported", "id", "family", "size", "layers", "window", "num_inference_steps"),
    *("guidance_scale", "scorer", "license", "gated"),
)


@dataclass(frozen=True)
class ModelEntry:
    """What the catalog says of a model."""

    name: str
    id: str
    family: str  # the name of diffusers' pipeline class
    size: int | None = None  # pixels a side
    layers: int | None = None  # cross-attention layers
    scheduler: str = "the pipeline's own"
    window: int = 2
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    scorer: str = "clip-vit-b-16"
    concepts: str = "sd"
    license: str = "not told"
    revision: str = "main"
    mirrors: tuple[str, ...] = ()
    # Kind → first layer of the window that the authors name, from 0 in execution order.
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
    # Cosines times this are the logits among which a softmax gives probabilities; None: the model's
    # own, as stored with its weights.
    logit_scale: float | None = None
    note: str = ""


def mini_folder(name: str = "mini") -> Path:
    """The folder of an embedded model's weights."""
    # That of "mini" is an ordinary diffusers pipeline folder. That of "mini-b" holds a U-Net only:
    # all other parts are those of "mini".
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


@functools.cache
def _models() -> dict[str, Any]:
    return read_toml(_MODELS)


def model_entry(name: str, file: str | Path | None = None) -> ModelEntry:
    """The entry of a model, from the catalog or from a TOML file of your own.

    Raises `LocogenError` with near matches for an unknown name.
    """
    if name.startswith(PLANTED):
        return _planted_model(name)
    entries = dict(_models()["models"])
    if file is not None:
        entries |= _own_models(Path(file))
    if name not in entries:
        raise unknown("model", name, entries)
    row = dict(entries[name])
    # TOML has lists and tables; an entry is frozen.
    row["mirrors"] = tuple(row.get("mirrors", ()))
    row["published"] = MappingProxyType(row.get("published", {}))
    return ModelEntry(name=name, **row)


def _planted_model(name: str) -> ModelEntry:
    """The entry of a planted model."""
    # Here, because that module describes its models by entries of this one.
    from locogen.catalog.plants import planted_model

    return planted_model(name)


# Entries of your own files by the place that a pipeline remembers (`pipe.config._name_or_path`).
_REGISTERED: dict[str, ModelEntry] = {}


def register(entry: ModelEntry) -> None:
    """Remember the entry of a loaded model: its pipeline finds its defaults by it."""
    _REGISTERED[entry.id] = entry


def _own_models(path: Path) -> dict[str, Any]:
    """The models of a file, checked; `LocogenError` names the file, the entry and the remedy."""
    entries = read_toml(path).get("models", {})
    if not entries:
        raise LocogenError(
            f"{path} has no models: begin an entry with a line such as [models.my-model]"
        )
    for name, row in entries.items():
        try:
            _check_model(name, row)
        except LocogenError as error:
            raise LocogenError(f"{path}: model {name!r}: {error}") from None
    return entries


def _check_model(name: str, row: Mapping[str, Any]) -> None:
    keys = {field.name for field in fields(ModelEntry)} - {"name", "embedded"}
    for key in row:
        if key not in keys:
            raise unknown("key", key, keys)
    for key in ("id", "family"):
        if not isinstance(row.get(key), str):
            raise LocogenError(f'{key} is missing: add a line {key} = "…"')
    if name in _models()["models"]:
        raise LocogenError("the catalog has a model of that name: give yours another name")


def model_entries(file: str | Path | None = None) -> tuple[ModelEntry, ...]:
    """Every model of the catalog, in its order, and those of a TOML file of your own."""
    names = list(_models()["models"])
    if file is not None:
        names += _own_models(Path(file))
    return tuple(model_entry(name, file) for name in names)


def entry_of(source: str) -> ModelEntry | None:
    """The entry of a model by the folder or hub id it was loaded from; None for an unknown one."""
    if source.startswith(PLANTED):
        return _planted_model(source)
    # A pipeline remembers the place that it came from, which may be a mirror.
    for entry in model_entries():
        if source in (entry.id, *entry.mirrors, str(entry.folder or entry.id)):
            return entry
    return _REGISTERED.get(source)


def published_start(model: str, kind: str) -> int | None:
    """Look up where LocoGen's authors found concepts of a kind.

    Args:
        model: The model's name, folder or hub id.
        kind: "style", "object" or "fact".

    Returns:
        The first layer of their window, from 0 in execution order; None where nothing is published.

    Example:
        >>> published_start("sd-1.4", "style"), published_start("mini", "style")
        (8, None)
    """
    entry = model_entry(model) if model in _models()["models"] else entry_of(model)
    return None if entry is None else entry.published.get(kind)


def usual_settings(source: str) -> dict[str, Any]:
    """Window, steps and guidance of a model, by the folder or hub id that it was loaded from."""
    entry = entry_of(source)
    if entry is None:
        # Those of Stable Diffusion, but fewer steps than the published 50.
        return {"window": 2, "num_inference_steps": 20, "guidance_scale": 7.5}
    return {
        "window": entry.window,
        "num_inference_steps": entry.num_inference_steps,
        "guidance_scale": entry.guidance_scale,
    }


def scorer_entry(name: str) -> ScorerEntry:
    """The catalog's entry of a scorer; `LocogenError` with near matches for an unknown name."""
    entries = _models()["scorers"]
    if name not in entries:
        raise unknown("scorer", name, entries)
    row = dict(entries[name])
    folder = row.pop("folder", None)
    return ScorerEntry(name=name, folder=_PACKAGE / folder if folder else None, **row)


def model_table(file: str | Path | None = None) -> DataFrame:
    """List the models that can be loaded by name.

    Args:
        file: A TOML file with models of your own (see `locogen.catalog.models`), listed as well;
            None: the catalog alone.

    Returns:
        One row a model: name, whether it is supported, hub id, family, size in pixels, number of
        layers, default window, steps and guidance scale, scorer, license, and whether it is gated.

    Raises:
        LocogenError: If the file cannot be read, or an entry is not in order.

    Example:
        >>> table = model_table().set_index("name")
        >>> int(table.loc["mini", "layers"])
        16
    """
    import pandas as pd

    rows = [{key: getattr(entry, key) for key in _COLUMNS} for entry in model_entries(file)]
    return pd.DataFrame(rows)
