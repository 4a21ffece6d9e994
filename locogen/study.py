"""Studies: a notebook run for many concepts and models, each run published whole or not at all.

A study is a TOML file; its results go to the folder of its name beside it (reports/mini.toml: reports/mini/):

    title = "Where the mini model keeps styles"
    notebook = "localize"              # of locogen's notebooks, or a path from here, such as "mine.ipynb"
    model = "mini"
    [defaults]                         # parameters of the notebook, for every run
    seeds = 4
    [[run]]                            # one run each: what differs
    concept = "mini/neon"
    [[run]]
    concept = "mini/van-gogh"
    title = "van gogh, wide"           # optional; its folder is called by `name`, else title, else concept
    window = 4

A run works in a folder `.partial-…`, renamed when all of it is there. A finished one is skipped while its `key` holds:
the hash of notebook, parameters, concept, weights (model, own scorer) and code. A failed one leaves `error.json`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from locogen import __version__
from locogen.catalog import concept, model_entries, read_toml
from locogen.errors import LocogenError, unknown
from locogen.plan import Window
from locogen.worker import (
    alone,
    check_parameters,
    defaults_of,
    execute,
    forget_place,
    load_json,
    notebook_file,
    parameters_of,
    plain,
    publish,
    source_of,
    write_json,
)

_PACKAGE = Path(__file__).resolve().parent
_ABOUT = ("title", "name", "notebook")  # keys of a run that are not parameters
_RESERVED = ("con", "prn", "aux", "nul", "store")  # Windows' device names, and our own folder
_PATHS = ("concepts_file", "store", "model", "scorer")  # parameters that may be paths, from the study's folder


class StudyFailed(LocogenError):
    """Some runs of a study failed; the others are there."""


@dataclass(frozen=True)
class Planned:
    """One run: the notebook, its parameters in plain JSON types, and the folder it becomes."""

    slug: str
    title: str
    notebook: Path
    parameters: Mapping[str, Any]
    base: Path  # the study's own folder: paths among the parameters start there
    folder: Path
    key: str = field(repr=False)

    @property
    def state(self) -> str:
        """`done` (and still valid), `outdated` (done otherwise), `failed` or `new`."""
        if (result := self.folder / "result.json").is_file():
            return "done" if load_json(result).get("key") == self.key else "outdated"
        return "failed" if (self.folder / "error.json").is_file() else "new"


def run_study(
    path: str | Path, *, only: str | Iterable[str] | None = None, force: bool = False, dry_run: bool = False
) -> Path:
    """Run what a study still lacks, one notebook after the other, and return its results folder.

    `only`: slugs, as the plan prints them; `force`: finished ones too; `dry_run`: the plan, no run.
    Every parameter is checked before the first kernel starts. Raises `LocogenError` when the study is not in
    order, `StudyFailed` at the end when runs failed. Ctrl-C says what is left; the same call goes on there.
    """
    title, results, runs = read_study(path)
    wanted = _selected(runs, only)
    todo = [run for run in wanted if force or run.state != "done"]
    print(f"{title}: {len(wanted)} runs, {len(todo)} to do, into {results}", flush=True)
    for run in wanted:
        print(f"  {run.slug}  {run.state}{' (again)' if force and run.state == 'done' else ''}", flush=True)
    if dry_run or not todo:
        return results
    results.mkdir(parents=True, exist_ok=True)
    with alone(results):
        write_json(results / "study.json", {"title": title, "runs": [run.slug for run in runs]})
        failed = _run_all(todo)
    if failed:
        told = "".join(f"\n  {slug}: {error}" for slug, error in failed.items())
        raise StudyFailed(f"{len(failed)} of {len(todo)} runs failed; the same command tries them again:{told}")
    return results


def read_study(path: str | Path) -> tuple[str, Path, tuple[Planned, ...]]:
    """A study's title, results folder and runs, all of it checked; starts no kernel."""
    path = Path(path).absolute()
    study = read_toml(path)
    known = ("title", "notebook", "model", "results", "defaults", "run")
    for key in study:
        if key not in known:
            raise LocogenError(f"{path}: {unknown('key', key, known)}")
    entries, defaults = study.get("run"), study.get("defaults", {})
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise LocogenError(f'{path} has no runs: add some, each a line [[run]] and a line concept = "…"')
    if not isinstance(defaults, dict):
        raise LocogenError(f"{path}: defaults is not a table: begin it with a line [defaults]")
    common = {**({"model": study["model"]} if "model" in study else {}), **defaults}
    results = path.parent / study.get("results", path.stem)
    rows = [
        {"notebook": study.get("notebook", "localize"), **_suited(common, entry, path), **entry} for entry in entries
    ]
    found = [_checked(row, path, number) for number, row in enumerate(rows, 1)]
    slugs = _slugs([name for name, *_ in found], [values for *_, values in found], path)
    runs = tuple(
        Planned(slug, title, notebook, values, path.parent, results / slug, _key(notebook, values, path.parent))
        for slug, (_, title, notebook, values) in zip(slugs, found, strict=True)
    )
    return str(study.get("title", path.stem)), results, runs


def _suited(common: Mapping[str, Any], entry: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The study's defaults for a run; for a run of another notebook, those that it has."""
    known: Iterable[str] = common
    with contextlib.suppress(LocogenError, TypeError):  # what is wrong with the notebook is told by `_checked`
        known = parameters_of(notebook_file(entry["notebook"], path.parent)) if "notebook" in entry else common
    return {name: value for name, value in common.items() if name in known}


def _selected(runs: tuple[Planned, ...], only: str | Iterable[str] | None) -> list[Planned]:
    if only is None:
        return list(runs)
    slugs = [only] if isinstance(only, str) else list(only)
    for slug in slugs:
        if slug not in {run.slug for run in runs}:
            raise unknown("run", slug, [run.slug for run in runs])
    return [run for run in runs if run.slug in slugs]


# --- checks --------------------------------------------------------------------------------------


def _checked(row: dict[str, Any], path: Path, number: int) -> tuple[str, str, Path, dict[str, Any]]:
    """A run's name, title, notebook and parameters; `LocogenError` says which run of which file is wrong."""
    try:
        notebook = notebook_file(str(row["notebook"]), path.parent)
        values = {key: plain(value) for key, value in row.items() if key not in _ABOUT}
        check_parameters(values, notebook)
        called = _called(values, path.parent)
    except LocogenError as error:
        raise LocogenError(f"{path}: run {number}: {error}") from None
    name = str(row.get("name") or row.get("title") or _named(values))
    return name, str(row.get("title") or called or name), notebook, values


def _named(values: Mapping[str, Any]) -> str:
    """What a run without a name is called after: its prompt, or its concept less the model's own prefix."""
    id = str(values.get("prompt") or values.get("concept") or "run")
    return id.removeprefix(f"{values.get('model')}/")


def _called(values: Mapping[str, Any], base: Path) -> str:
    """The name of a run's prompt or concept. Raises `LocogenError` for a model or concept that is not there."""
    model = values.get("model")
    known = [entry.name for entry in model_entries()]
    if isinstance(model, str) and "/" not in model and model not in known:
        raise unknown("model", model, known)
    if values.get("prompt") or not values.get("concept"):
        return str(values.get("prompt", ""))
    own = values.get("concepts_file")
    return concept(values["concept"], file=base / own if own else None).name


# --- names and keys ------------------------------------------------------------------------------


def slugify(name: str) -> str:
    """A folder name that is safe on every system: lower-case letters of any script, digits, hyphens."""
    text = unicodedata.normalize("NFKC", name).lower()
    short = "-".join("".join(c if c.isalnum() else " " for c in text).split())[:60].rstrip("-")
    while len(short.encode()) > 120:  # letters of other scripts take several bytes
        short = short[:-1]
    reserved = short in _RESERVED or re.fullmatch(r"(com|lpt)\d", short)
    return f"{short}-{_hash(name)[:6]}".lstrip("-") if reserved or not short else short


def _slugs(names: list[str], values: list[dict[str, Any]], path: Path) -> list[str]:
    """A slug for each run; of several alike, the first keeps it and the others get a short hash."""
    taken: dict[str, dict[str, Any]] = {}  # in the order of the runs
    for number, (name, parameters) in enumerate(zip(names, values, strict=True), 1):
        slug = slugify(name)
        if slug in taken:
            slug = f"{slug}-{_hash([name, parameters])[:6]}"
        if slug in taken:
            raise LocogenError(f"{path}: run {number} ({name}) is there twice: change a parameter or take it out")
        taken[slug] = parameters
    return list(taken)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _key(notebook: Path, values: Mapping[str, Any], base: Path) -> str:
    """Changes with what a result depends on: notebook, parameters, concept, weights, code, versions."""
    told: dict[str, Any] = {"notebook": source_of(notebook), "parameters": values, "code": _code_hash()}
    used = {**defaults_of(notebook), **values}
    own = used.get("concepts_file")
    if used.get("concept") and not used.get("prompt"):
        told["concept"] = repr(concept(used["concept"], file=base / own if own else None))
    told |= {name: _weights_hash(str(used[name]), base) for name in ("model", "scorer") if used.get(name)}
    return _hash({**told, "versions": versions()})


def _code_hash() -> str:
    """Of what a notebook can reach: not the command line's modules, nor the mini model's trainer."""
    apart = [_PACKAGE / name for name in ("__main__.py", "report.py", "study.py", "worker.py")]
    files = [file for file in sorted(_PACKAGE.rglob("*.py")) if file.parent.name != "mini" and file not in apart]
    files.append(_PACKAGE / "catalog" / "models.toml")  # what is usual for a model
    return _hash([__version__, *(file.read_text(encoding="utf-8") for file in files)])


def _weights_hash(name: str, base: Path) -> list[Any]:
    """A model or scorer by the content of its folder, a scorer inside included; others by their name or id."""
    entry = next((entry for entry in model_entries() if entry.name == name), None)
    folder = entry.folder if entry else base / name
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder else []
    return [name, *((file.relative_to(folder), _digest(file, file.stat().st_mtime_ns)) for file in files if folder)]


@functools.cache
def _digest(file: Path, changed: int) -> str:
    """Of a file's content; read again when it has `changed`, and not for every run of a study."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Of locogen, Python and the libraries that results depend on."""
    import platform
    from importlib.metadata import version

    own = {"locogen": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy", "pandas")}


# --- runs ----------------------------------------------------------------------------------------


def _run_all(todo: list[Planned]) -> dict[str, str]:
    """Run them in turn, a line each; slug → error of those that failed."""
    failed: dict[str, str] = {}
    for number, run in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {run.slug} … ", end="", flush=True)
        try:
            seconds, error, found = _run_one(run)
        except KeyboardInterrupt:
            left = ", ".join(run.slug for run in todo[number - 1 :])
            print(f"interrupted\nleft: {left}. The same command goes on from here.", flush=True)
            raise
        print(f"{'failed' if error else 'done'} in {seconds:.0f} s: {error or found}", flush=True)
        if error:
            failed[run.slug] = error
    return failed


def _run_one(run: Planned) -> tuple[float, str, str]:
    """Execute one notebook and publish its folder: seconds, the error if there was one, what was found."""
    partial = run.folder.with_name(f".partial-{run.slug}")
    partial.mkdir()
    start = time.perf_counter()
    try:
        error = execute(run.notebook, partial, _for_kernel(run, partial))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    seconds = time.perf_counter() - start
    forget_place(partial / "notebook.ipynb")
    found = load_json(partial / "finding.json")
    (partial / "finding.json").unlink(missing_ok=True)
    result = {"key": run.key, "title": run.title, "notebook": run.notebook.stem, **_about(run), **found}
    if "model" in run.parameters:
        result["model"] = run.parameters["model"]  # the kernel saw a folder from its own place
    result |= {"parameters": dict(run.parameters), "versions": versions(), "seconds": round(seconds, 1)}
    result["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    if error:
        result |= {"error": error.message, "cell": error.cell}
    write_json(partial / ("error.json" if error else "result.json"), result)
    publish(partial, run.folder)
    return seconds, error.message.strip().splitlines()[0] if error else "", _places(found)


def _places(found: Mapping[str, Any]) -> str:
    """The carriers, for the terminal."""
    told = [str(Window(row.get("start"), row.get("width", 1))) for row in found.get("carriers", [])]
    return ", ".join(told) or "executed"


def _about(run: Planned) -> dict[str, Any]:
    """What a result says of its subject when the notebook itself says nothing."""
    return {
        "model": run.parameters.get("model", ""),
        "concepts": [run.title],
        "kind": run.parameters.get("kind", ""),
        "finding": "",
        "carriers": [],
        "settings": {},
        "pictures": 0,
    }


def _for_kernel(run: Planned, folder: Path) -> dict[str, Any]:
    """The parameters as the kernel sees them, which works in `folder`: paths are made relative to it."""
    valid = parameters_of(run.notebook)
    values = dict(run.parameters)
    for name in _PATHS:
        if _is_path(name, values.get(name), run.base):
            with contextlib.suppress(ValueError):  # Windows: another drive
                values[name] = Path(os.path.relpath(run.base / values[name], folder)).as_posix()
    if "store" in valid:
        values.setdefault("store", "../store")
    if "results" in valid:
        values["results"] = "."
    return values


def _is_path(name: str, value: Any, base: Path) -> bool:
    """Files are always paths; a model or a scorer is one when it has a slash and is there, else a hub id."""
    if not value or not isinstance(value, str):
        return False
    return name in ("concepts_file", "store") or ("/" in value and (base / value).exists())
