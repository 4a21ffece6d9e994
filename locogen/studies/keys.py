"""What a result depends on, in one hash: a finished run is skipped while its hash is the same."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locogen import __version__
from locogen.catalog import ModelEntry, concept, mini_folder, model_entries, scorer_entry
from locogen.errors import LocogenError
from locogen.models.checkpoint import count_layers
from locogen.plan import Concept
from locogen.studies.digests import digest
from locogen.studies.notebooks import defaults_of, source_of

_PACKAGE = Path(__file__).resolve().parent.parent
_WEIGHTS = ("model", "scorer")  # parameters that name some
_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pandas")

# What no notebook can reach: a change there leaves results as they are.
_UNREACHED = ("__main__.py", "mini", "pages", "studies")


def hashed(value: Any) -> str:
    """A hash of anything that JSON can hold; other objects count by what they print."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def circumstances() -> dict[str, Any]:
    """What all runs of a study depend on: the code that notebooks reach, and the versions used."""
    return {"code": _code_hash(), "versions": versions()}


def versions() -> dict[str, str]:
    """The versions of locogen, Python and the libraries that results depend on."""
    # `platform` and the metadata take some time to load, and most commands need neither.
    import platform
    from importlib.metadata import version

    numbers = {"locogen": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        numbers[name] = version(name)
    return numbers


def entry_named(values: Mapping[str, Any], base: Path) -> ModelEntry | None:
    """The entry of the model that parameters name; None for a folder, a hub id, or nothing.

    Args:
        values: Parameters of a notebook: `model`, and `models_file` for a TOML file of one's own.
        base: The study's folder, where the path of that file starts.
    """
    for entry in model_entries(_models_file(values, base)):
        if entry.name == values.get("model"):
            return entry
    return None


def _models_file(values: Mapping[str, Any], base: Path) -> Path | None:
    file = values.get("models_file")
    return base / file if isinstance(file, str) and file else None


def model_place(values: Mapping[str, Any], base: Path) -> Path | None:
    """The folder on this machine that a model is loaded from; None if it is on the hub."""
    entry = entry_named(values, base)
    if entry is not None and entry.folder is not None:
        return entry.folder
    model = str(values.get("model") or "")
    places = [base / model]
    if entry is not None:
        # In a file of one's own a folder starts where that file is.
        file = _models_file(values, base) or base
        places = [Path(entry.id).expanduser(), file.parent / entry.id]
    for place in places:
        if model and place.is_dir():
            return place
    return None


def layers_of(values: Mapping[str, Any], base: Path) -> int | None:
    """How many layers the model has that parameters name; None where no file here says so."""
    entry = entry_named(values, base)
    if entry is not None and entry.layers is not None:
        return entry.layers
    place = model_place(values, base)
    return None if place is None else count_layers(place)


def concept_of(values: Mapping[str, Any], base: Path) -> Concept | None:
    """The concept that parameters name; None if they name none, or a prompt replaces it.

    Args:
        values: Parameters of a notebook.
        base: The study's folder, where the path of a file of concepts starts.

    Raises:
        LocogenError: There is no such concept.
    """
    name = values.get("concept")
    if not name or values.get("prompt"):
        return None
    file = values.get("concepts_file")
    if not file:
        return concept(name)
    return concept(name, file=base / file)


# --- the key of a run ----------------------------------------------------------------------------


def run_key(
    notebook: Path, values: Mapping[str, Any], base: Path, common: Mapping[str, Any]
) -> str:
    """The hash of all that a run's result depends on.

    Args:
        notebook: Its cells count, its outputs and metadata do not.
        values: The parameters of the run. Those left out count by the notebook's defaults.
        base: The study's folder, where paths among the parameters start.
        common: What `circumstances` returns; the same for all runs of a study.

    Returns:
        The hash as hexadecimal digits.
    """
    parts: dict[str, Any] = {"notebook": source_of(notebook), "parameters": values}
    used = {**defaults_of(notebook), **values}

    # By its content, so that a change in a file of concepts counts.
    subject = concept_of(used, base)
    if subject is not None:
        parts["concept"] = repr(subject)
    for parameter in _WEIGHTS:
        if used.get(parameter):
            parts[parameter] = _weights_hash(str(used[parameter]), base)
    if used.get("models_file"):
        # Its entry holds the model's usual settings, and where its weights are.
        parts["models_file"] = repr(entry_named(used, base))
        parts["model's folder"] = _contents([model_place(used, base)])
    return hashed({**parts, **common})


def _code_hash() -> str:
    """The hash of what a notebook can reach: no command line, studies, pages, or trainer."""
    texts = [__version__]
    for file in sorted(_PACKAGE.rglob("*.py")):
        if file.relative_to(_PACKAGE).parts[0] not in _UNREACHED:
            texts.append(file.read_text(encoding="utf-8"))
    # It holds the usual settings of a model, which a notebook takes where a study sets none.
    texts.append((_PACKAGE / "catalog" / "models.toml").read_text(encoding="utf-8"))
    return hashed(texts)


def _weights_hash(name: str, base: Path) -> list[Any]:
    """A model or scorer by the content of its folder, if it has one; others by their name or id."""
    entry = entry_named({"model": name}, base)
    folders = [entry.folder if entry else base / name]
    if name == "mini-b":
        # Only its U-Net is its own: all other parts are those of the first mini model.
        folders.append(mini_folder())

    return [name, *_contents(folders)]


def _contents(folders: Sequence[Path | None]) -> list[Any]:
    """Path and hash of each file; None stands for a model that is not on this machine."""
    parts: list[Any] = []
    for folder in folders:
        if folder is None:
            continue
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                parts.append((file.relative_to(folder), _digest(file, file.stat().st_mtime_ns)))
    return parts


@functools.cache
def _digest(file: Path, changed: int) -> str:
    """The hash of a file's content; with `changed`, the cache forgets a file that was written."""
    return digest(file)


# --- weights of the hub --------------------------------------------------------------------------


def commits(notebook: Path, values: Mapping[str, Any], base: Path) -> dict[str, str]:
    """The commits of model and scorer that this machine holds from the hub; nothing for the others.

    They are not part of the key: a first run fetches its model, and must not count as outdated for
    that reason.
    """
    used = {**defaults_of(notebook), **values}
    sources = {
        "model": _model_sources(used, base),
        "scorer": _scorer_sources(str(used.get("scorer") or "")),
    }
    present = {parameter: _cached_commit(ids) for parameter, ids in sources.items()}
    return {parameter: commit for parameter, commit in present.items() if commit}


def _model_sources(values: Mapping[str, Any], base: Path) -> list[tuple[str, str]]:
    """The (id, revision) that a model is loaded from, in the order in which they are tried."""
    entry = entry_named(values, base)
    if entry is None or entry.embedded:
        return _hub_id(str(values.get("model") or ""))
    mirrors = [(mirror, "main") for mirror in entry.mirrors]
    return [(entry.id, entry.revision), *mirrors]


def _scorer_sources(name: str) -> list[tuple[str, str]]:
    if not name or "/" in name:
        return _hub_id(name)
    # The name of a folder, which the catalog does not know, has no source on the hub.
    with contextlib.suppress(LocogenError):
        entry = scorer_entry(name)
        return [(entry.id, entry.revision)]
    return []


def _hub_id(name: str) -> list[tuple[str, str]]:
    """The name itself if it can be an id of the hub: an owner and a name, not a path."""
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return [(name, "main")]
    return []


def _cached_commit(sources: list[tuple[str, str]]) -> str:
    """`id@commit` of the first source that the hub's cache holds; empty if it holds none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for id, revision in sources:
        ref = Path(HF_HUB_CACHE, "models--" + id.replace("/", "--"), "refs", revision)
        if ref.is_file():
            return f"{id}@{ref.read_text(encoding='utf-8').strip()}"
    return ""
