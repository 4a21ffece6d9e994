"""What a study adds: to a notebook that papermill runs anyway, and to the patience of who types the command.

`python tests/benchmarks/study.py` prints medians and writes them to `runs/study/study.json`. The notebook does nothing,
so that all that is seen is overhead; bare and by locogen take turns, so that other work on the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbformat.v4 import new_code_cell, new_notebook

from locogen.studies.kernel import silence
from locogen.studies.planning import read_study
from locogen.studies.worker import run_one

ROOT = Path(__file__).resolve().parent.parent.parent
PARAMETERS = 'number: int = 0  # which\nresults: str = ""  # tables'


def timed(job: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and of processors (children included): these hardly mind other work on the machine."""
    start, before = time.perf_counter(), os.times()
    job()
    after = os.times()
    return time.perf_counter() - start, sum(after[:4]) - sum(before[:4])


def command(*words: str) -> Callable[[], Any]:
    return lambda: subprocess.run(
        [sys.executable, "-m", *words], check=True, capture_output=True, cwd=ROOT
    )


def jobs(folder: Path) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; a "bare" one is the same work without locogen."""
    notebook, study = folder / "nothing.ipynb", folder / "nothing.toml"
    cells = [
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell("number + 1"),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), notebook)
    study.write_text('notebook = "nothing.ipynb"\n[grid]\nnumber = [1]\n', encoding="utf-8")
    (run,) = read_study(study)[2]
    run.folder.parent.mkdir()
    bare = {"progress_bar": False, "kernel_name": "python3"}
    return {
        "python alone": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
        "locogen --help": command("locogen", "--help"),
        "locogen run reports/mini.toml --dry-run": command(
            "locogen", "run", "reports/mini.toml", "--dry-run"
        ),
        "papermill, one notebook": command(
            "papermill", "-p", "number", "1", str(notebook), str(folder / "out.ipynb")
        ),
        "locogen run, a study of one notebook": command(
            "locogen", "run", str(study), "--force", "--engine", "serial"
        ),
        "papermill within Python": lambda: papermill.execute_notebook(
            notebook, folder / "out.ipynb", {}, **bare
        ),
        "a run within a study": lambda: run_one(run),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    chosen = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, silence():
        measured = jobs(Path(folder))
        for _ in range(chosen.repeats + 1):  # the first warms the disk's cache, and does not count
            for name, job in measured.items():
                taken.setdefault(name, []).append(timed(job))
    seconds = {name: values[1:] for name, values in taken.items()}
    medians = {
        name: [round(statistics.median(part), 3) for part in zip(*values, strict=True)]
        for name, values in seconds.items()
    }
    whole = apart(medians, "locogen run, a study of one notebook", "papermill, one notebook")
    medians["overhead of the command"] = whole
    medians["overhead of a run"] = apart(medians, "a run within a study", "papermill within Python")
    print("   clock  processor")
    for name, (clock, processor) in medians.items():
        print(f"{clock:6.2f} s   {processor:6.2f} s  {name}")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    machine = {"cores": os.cpu_count(), "load": load, "python": platform.python_version()}
    report = {
        "median_seconds": medians,
        "seconds": seconds,
        "repeats": chosen.repeats,
        "machine": machine,
    }
    (chosen.folder / "study.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def apart(medians: dict[str, list[float]], ours: str, bare: str) -> list[float]:
    return [round(one - other, 3) for one, other in zip(medians[ours], medians[bare], strict=True)]


if __name__ == "__main__":
    main()
