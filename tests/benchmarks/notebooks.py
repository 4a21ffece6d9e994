"""How long each notebook takes at its defaults, and each change in `explore`: `python tests/benchmarks/notebooks.py`.

Executes the notebooks (or those named) by plain papermill and prints the lines of README's table. CPU time is what the
kernel used, whatever else the machine was doing: on an idle core the wall clock shows the same. With `--explore` it
changes the controls of `explore` instead, as the first notebook sets it up, and prints the seconds of each change.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import papermill

import locogen as loco

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = Path("runs/notebooks")


def cpu() -> float:
    """Seconds of processor time that finished child processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(notebook: Path) -> dict[str, float]:
    """Wall and CPU seconds of one notebook at its defaults."""
    before, start = cpu(), time.perf_counter()
    papermill.execute_notebook(
        str(notebook), str(OUT / notebook.name), progress_bar=False, cwd=str(OUT)
    )
    return {"wall": time.perf_counter() - start, "cpu": cpu() - before}


def explored(seeds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of changes that make new pictures, by control; seeds also with edit and neurons on."""
    pipe = loco.load("mini")
    concept = loco.concept("mini/neon")
    concept = dataclasses.replace(concept, pairs=concept.pairs[:2])
    run = loco.localize(
        pipe, concept, window=2, seeds=range(2), num_inference_steps=8, progress=False
    )
    box = loco.explore(run, tokens="end", ridge=0.1)
    found: dict[str, list[tuple[float, float]]] = {}

    def change(name: str, control: Any, value: Any, trait: str = "value") -> None:
        wall, used = time.perf_counter(), time.process_time()
        setattr(control, trait, value)
        found.setdefault(name, []).append((time.perf_counter() - wall, time.process_time() - used))

    for i in range(seeds):
        box.strength.value = box.neurons.value = 0
        change("cell", box.heatmap, ("neon", i), "selected")
        change("seed: 3 pictures", box.seed, 100 + i)
        change("layers: 1 picture", box.window, (i, 15))
        change("edit strength: 1 picture", box.strength, 1.0)
        change("neurons: 1 picture", box.neurons, 10)
        change("seed, with edit and neurons: 5 pictures", box.seed, 200 + i)
    return found


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="notebooks by name; default: all")
    parser.add_argument("--explore", action="store_true")
    asked = parser.parse_args()
    if asked.explore:
        for name, times in explored(5).items():
            wall, used = (statistics.median(part) for part in zip(*times, strict=True))
            print(f"{name}: {wall:.2f} s, of these {used:.2f} s of processor time")
        return
    OUT.mkdir(parents=True, exist_ok=True)
    times: dict[str, dict[str, float]] = {}
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if not asked.names or notebook.stem in asked.names:
            times[notebook.stem] = execute(notebook)
            (OUT / "times.json").write_text(json.dumps(times, indent=1), encoding="utf-8")
            wall, used = (times[notebook.stem][name] / 60 for name in ("wall", "cpu"))
            print(
                f"| {notebook.stem} | {used:.1f} min of processor time, {wall:.1f} min by the clock |",
                flush=True,
            )


if __name__ == "__main__":
    main()
