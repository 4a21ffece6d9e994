"""One run of a study, from its parameters to its published folder; in this process or in a worker far away.

A run works in a folder `.partial-…`, which becomes the run's folder when all of it is there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from locogen.errors import LocogenError
from locogen.files import CannotWrite, load_json, publish, write_json, writing
from locogen.pictures.progress import ASKED, heard
from locogen.plan import Window
from locogen.studies.kernel import Failure, execute
from locogen.studies.keys import commits, versions
from locogen.studies.notebooks import parameters_of
from locogen.studies.planning import Planned
from locogen.studies.records import is_window

_PATHS = (
    "concepts_file",
    "store",
    "model",
    "scorer",
)  # parameters that may be paths, from the study's folder
_here = threading.local()  # the GPU of this thread


@dataclass(frozen=True)
class Outcome:
    """What became of a run: the error if there was one, the seconds, pictures made, and what was found."""

    error: str
    seconds: float
    made: int = 0
    said: str = ""


def take_gpu(free: SimpleQueue[str]) -> None:
    """Keep one of the GPUs for the runs of this thread."""
    _here.gpu = free.get()


def run_one(run: Planned, threads: int | None = None) -> Outcome:
    """Execute one notebook and publish its folder. `threads`: of its kernel; None: as the environment says.

    Raises `LocogenError` where the study's folder is not to be seen, and what the disk raises.
    """
    partial = _working_folder(run)
    start = time.perf_counter()
    try:
        with writing(partial.parent):
            error = execute(
                run.notebook, partial, _for_kernel(run, partial), _environment(partial, threads)
            )
            return _publish(run, partial, error, time.perf_counter() - start)
    except (OSError, CannotWrite):
        if partial.is_dir():
            raise
        return Outcome("stopped", time.perf_counter() - start)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _working_folder(run: Planned) -> Path:
    """A new folder for a run to work in, beside the one that it becomes."""
    partial = run.folder.with_name(f".partial-{run.slug}-{os.urandom(4).hex()}")
    try:
        with writing(partial.parent):
            partial.mkdir()
    except FileNotFoundError:
        raise LocogenError(
            f"this worker sees no folder {partial.parent}: workers share it, at the same path"
        ) from None
    return partial


def _environment(partial: Path, threads: int | None) -> dict[str, str]:
    """What the kernel finds in its environment, beside what is there already."""
    told = {ASKED: str(partial / "progress.json")}
    if threads:
        told["OMP_NUM_THREADS"] = str(threads)
    if gpu := getattr(_here, "gpu", ""):
        told["CUDA_VISIBLE_DEVICES"] = gpu
    return told


def _publish(run: Planned, partial: Path, error: Failure | None, seconds: float) -> Outcome:
    """Write what the run is and found, last of all its result, and put the folder in its place."""
    made, _ = heard(partial)
    found = load_json(partial / "finding.json")
    for name in ("finding.json", "progress.json"):
        (partial / name).unlink(missing_ok=True)
    forget_place(partial / "notebook.ipynb")
    result = {
        **_about(run),
        **found,
        "key": run.key,
        "title": run.title,
        "notebook": run.notebook.stem,
    }
    if "model" in run.parameters:
        result["model"] = run.parameters["model"]  # the kernel saw a folder from its own place
    result |= {
        "parameters": dict(run.parameters),
        "versions": versions(),
        "seconds": round(seconds, 1),
        "made": made,
    }
    result["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    result["commits"] = {
        **commits(run.notebook, run.parameters),
        **run.commits,
    }  # or as the run has fetched them
    if error:
        result |= {"error": error.message, "cell": error.cell}
    write_json(partial / ("error.json" if error else "result.json"), result)
    publish(partial, run.folder)
    return Outcome(first_line(error.message) if error else "", seconds, made, _places(found))


def give_up(run: Planned, message: str) -> Outcome:
    """Publish a run as failed that no worker lived to tell of."""
    partial = _working_folder(run)
    with writing(partial.parent):
        return _publish(run, partial, Failure(message), 0.0)


def first_line(message: str) -> str:
    """Of an error, for the terminal."""
    return (message.strip().splitlines() or ["it failed and did not say why"])[0]


def _places(found: Mapping[str, Any]) -> str:
    """The carriers, for the terminal."""
    rows = found.get("carriers")
    if not isinstance(rows, list):  # of a notebook that is not ours
        return "executed"
    windows = [str(Window(row.get("start"), row.get("width", 1))) for row in rows if is_window(row)]
    return ", ".join(windows) or "executed"


def _about(run: Planned) -> dict[str, Any]:
    """What a result says of its subject when the notebook itself says nothing."""
    return {
        "model": run.parameters.get("model", ""),
        "concepts": [run.subject],
        "kind": run.parameters.get("kind", ""),
        "finding": "",
        "carriers": [],
        "settings": {},
        "pictures": 0,
    }


def forget_place(executed: Path) -> None:
    """Take out where on this machine the notebook was executed: pages are shared."""
    if book := load_json(executed):
        told = book.get("metadata", {}).get("papermill", {})
        told.update(
            {key: Path(told[key]).name for key in ("input_path", "output_path") if told.get(key)}
        )
        write_json(executed, book)


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
