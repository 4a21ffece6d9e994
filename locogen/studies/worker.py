"""One run of a study, from its parameters to its published folder; also in a remote worker.

A run works in a folder `.partial-…`, which becomes the run's folder when everything in it is
complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from locogen.console import ASKED
from locogen.errors import LocogenError
from locogen.files import AUTO, CannotWrite, load_json, publish, write_json, writing
from locogen.finding import FILE as FINDING_FILE, Finding
from locogen.pictures.progress import read_progress
from locogen.studies.kernel import Failure, execute
from locogen.studies.keys import commits, versions
from locogen.studies.notebooks import parameters_of
from locogen.studies.planning import Planned

# Parameters that may be paths, which start at the study's folder.
_PATHS = ("concepts_file", "models_file", "store", "model", "scorer")
_thread = threading.local()  # its GPU, where each thread has one


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        error: Its first line; empty where there was none.
        seconds: That the run took.
        pictures: That it made, without those that were in the store.
        summary: What it found, for a line on the terminal.
        making: Seconds that the pictures took: without starting the kernel, loading and scoring.
    """

    error: str
    seconds: float
    pictures: int = 0
    summary: str = ""
    making: float = 0.0


def take_gpu(free: SimpleQueue[str]) -> None:
    """Keep one of the free GPUs for all runs of this thread."""
    _thread.gpu = free.get()


def run_one(run: Planned, threads: int | None = None) -> Outcome:
    """Execute one notebook and publish its folder.

    Args:
        run: What to execute.
        threads: Of its kernel. Left out: as the environment says.

    Returns:
        What became of it. A notebook that fails is published too.

    Raises:
        LocogenError: The study's folder is not visible from here, or cannot be written.
    """
    partial = _working_folder(run)
    start = time.perf_counter()
    try:
        with writing(partial.parent):
            parameters = _for_kernel(run, partial)
            error = execute(run.notebook, partial, parameters, _environment(partial, threads))
            return _publish(run, partial, error, time.perf_counter() - start)
    except (OSError, CannotWrite):
        if partial.is_dir():
            raise
        # Without its folder nothing can be written: somebody has stopped the run by deleting it.
        return Outcome("stopped", time.perf_counter() - start)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def give_up(run: Planned, message: str) -> Outcome:
    """Publish a run as failed whose workers did not live to do so."""
    partial = _working_folder(run)
    with writing(partial.parent):
        return _publish(run, partial, Failure(message), 0.0)


def _working_folder(run: Planned) -> Path:
    """A new folder for a run to work in, next to the one that it becomes."""
    # A name of its own: Dask may start a run again while a lost worker still works on it.
    partial = run.folder.with_name(f".partial-{run.slug}-{os.urandom(4).hex()}")
    try:
        with writing(partial.parent):
            partial.mkdir()
    except FileNotFoundError:
        raise LocogenError(
            f"this worker sees no folder {partial.parent}: "
            "all workers must share the study's folder, at the same path"
        ) from None
    return partial


def _environment(partial: Path, threads: int | None) -> dict[str, str]:
    """Variables for the kernel, in addition to those that it inherits."""
    variables = {ASKED: str(partial / "progress.json")}
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    gpu = getattr(_thread, "gpu", "")
    if gpu:
        variables["CUDA_VISIBLE_DEVICES"] = gpu
    return variables


def _publish(run: Planned, partial: Path, error: Failure | None, seconds: float) -> Outcome:
    """Write what the run is and found, last of all its result, and put the folder in its place."""
    counts = read_progress(partial)
    finding = _finding(run, partial)
    for name in (FINDING_FILE, "progress.json"):
        (partial / name).unlink(missing_ok=True)
    forget_place(partial / "notebook.ipynb")
    result = {
        **finding.facts(),
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
        "made": counts.pictures,
    }
    result["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    result["commits"] = {
        **commits(run.notebook, run.parameters, run.base),
        **run.commits,
    }  # or as the run has fetched them
    if error:
        result |= {"error": error.message, "cell": error.cell}
    write_json(partial / ("error.json" if error else "result.json"), result)
    publish(partial, run.folder)
    return Outcome(
        first_line(error.message) if error else "",
        seconds,
        counts.pictures,
        _places(finding),
        counts.seconds,
    )


def first_line(message: str) -> str:
    """The first line of an error, for the terminal."""
    return (message.strip().splitlines() or ["it failed without an error message"])[0]


def _places(finding: Finding) -> str:
    """The carriers, for the terminal; a notebook that names none was just executed."""
    return ", ".join(str(window) for window in finding.carriers.values()) or "executed"


def _finding(run: Planned, partial: Path) -> Finding:
    """What the notebook reports; what it leaves out is filled in from the run's parameters."""
    finding = Finding.read(partial)
    return replace(
        finding,
        model=finding.model or str(run.parameters.get("model", "")),
        concepts=finding.concepts or [run.subject],
        kind=finding.kind or str(run.parameters.get("kind", "")),
    )


def forget_place(executed: Path) -> None:
    """Take out where on this machine the notebook was executed: pages are shared."""
    book = load_json(executed)
    if not book:
        return
    record = book.get("metadata", {}).get("papermill", {})
    for key in ("input_path", "output_path"):
        if record.get(key):
            record[key] = Path(record[key]).name
    write_json(executed, book)


def _for_kernel(run: Planned, folder: Path) -> dict[str, Any]:
    """The parameters for the kernel, which works in `folder`: paths are made relative to it."""
    valid = parameters_of(run.notebook)
    values = dict(run.parameters)
    for name in _PATHS:
        if _is_path(name, values.get(name), run.base):
            with contextlib.suppress(ValueError):  # Windows: on another drive
                values[name] = Path(os.path.relpath(run.base / values[name], folder)).as_posix()
    if "store" in valid:
        # One for the whole study: runs share pictures, such as those without an intervention.
        values.setdefault("store", "../store")
    if "results" in valid:
        values["results"] = "."
    return values


def _is_path(name: str, value: Any, base: Path) -> bool:
    """Files are always paths; a model or a scorer with a slash may also be an id of the hub."""
    if not value or not isinstance(value, str):
        return False
    if name in ("concepts_file", "models_file", "store"):
        return value != AUTO
    return "/" in value and (base / value).exists()
