"""What a result depends on, in one hash: a finished run is skipped for as long as it stays the same."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locogen import __version__
from locogen.catalog import concept, mini_folder, model_entries, scorer_entry
from locogen.errors import LocogenError
from locogen.studies.digests import digest
from locogen.studies.notebooks import defaults_of, source_of

_PACKAGE = Path(__file__).resolve().parent.parent
_WEIGHTS = ("model", "scorer")  # parameters that name some


# What no notebook reaches: a change there leaves results as they are.
_APART = ("__main__.py", "mini", "pages", "studies")


def hashed(value: Any) -> str:
    """A hash of anything that JSON can tell; of other things as they print."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def circumstances() -> dict[str, Any]:
    """What every run of a study rests on: the code that notebooks reach, and the versions beneath it."""
    return {"code": _code_hash(), "versions": versions()}


def run_key(
    notebook: Path, values: Mapping[str, Any], base: Path, common: Mapping[str, Any]
) -> str:
    """Changes with what a result depends on: notebook, parameters, concept, weights, and the `circumstances`."""
    told: dict[str, Any] = {"notebook": source_of(notebook), "parameters": values}
    used = {**defaults_of(notebook), **values}
    own = used.get("concepts_file")
    if used.get("concept") and not used.get("prompt"):
        told["concept"] = repr(concept(used["concept"], file=base / own if own else None))
    told |= {name: _weights_hash(str(used[name]), base) for name in _WEIGHTS if used.get(name)}
    return hashed({**told, **common})


def _code_hash() -> str:
    """Of what a notebook can reach: not the command line, studies and pages, nor the mini model's trainer."""
    files = [
        file
        for file in sorted(_PACKAGE.rglob("*.py"))
        if file.relative_to(_PACKAGE).parts[0] not in _APART
    ]
    files.append(_PACKAGE / "catalog" / "models.toml")  # what is usual for a model
    return hashed([__version__, *(file.read_text(encoding="utf-8") for file in files)])


def _weights_hash(name: str, base: Path) -> list[Any]:
    """A model or scorer by the content of its folder, a scorer inside included; others by their name or id."""
    entry = next((entry for entry in model_entries() if entry.name == name), None)
    folders = [entry.folder if entry else base / name]
    folders += [mini_folder()] if name == "mini-b" else []  # it has but a U-Net of its own
    told: list[Any] = [name]
    for folder in [folder for folder in folders if folder]:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        told += [
            (file.relative_to(folder), _digest(file, file.stat().st_mtime_ns)) for file in files
        ]
    return told


def commits(notebook: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Of the model and scorer from the hub: what this machine holds of them; nothing for those it does not hold.

    They are no part of the key: a first run fetches its model, and is not to be done again for that.
    """
    used = {**defaults_of(notebook), **values}
    found = {
        name: _commit(str(used[name]), scores=name == "scorer")
        for name in _WEIGHTS
        if used.get(name)
    }
    return {name: commit for name, commit in found.items() if commit}


def _commit(name: str, *, scores: bool) -> str:
    """As the hub's cache has it, of the first source that is there, in the order in which they are loaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    sources = (
        [(name, "main")] if name.count("/") == 1 and not name.startswith((".", "/", "~")) else []
    )
    if scores and "/" not in name:
        with contextlib.suppress(LocogenError):  # a folder
            entry = scorer_entry(name)
            sources = [(entry.id, entry.revision)]
    elif own := next(
        (entry for entry in model_entries() if entry.name == name and not entry.embedded), None
    ):
        sources = [(own.id, own.revision), *((mirror, "main") for mirror in own.mirrors)]
    for id, revision in sources:
        ref = Path(HF_HUB_CACHE, "models--" + id.replace("/", "--"), "refs", revision)
        if ref.is_file():
            return f"{id}@{ref.read_text(encoding='utf-8').strip()}"
    return ""


@functools.cache
def _digest(file: Path, changed: int) -> str:
    """Of a file's content; asked again when it has `changed`, and not for every run of a study."""
    return digest(file)


def versions() -> dict[str, str]:
    """Of locogen, Python and the libraries that results depend on."""
    import platform
    from importlib.metadata import version

    own = {"locogen": __version__, "python": platform.python_version()}
    return own | {
        name: version(name) for name in ("torch", "diffusers", "transformers", "numpy", "pandas")
    }
