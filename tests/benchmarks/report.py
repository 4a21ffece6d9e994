"""How long the pages of 100 and of 1000 runs take, and how large the index is: made-up results, two models.

`python tests/benchmarks/report.py [--runs 100 1000] [--repeats 5]`; medians, written to `runs/report.json`. Each run
has a notebook of a few cells and pictures of noise; a real notebook takes about a second more the first time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.made_up import study

from locogen import __version__
from locogen.pages.build import build, gather
from locogen.pages.index import index_page
from locogen.pages.results import read_runs

MODELS = ("mini", "mini-b")


def spent(work: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Median seconds by the clock and of the processor, and all of them."""
    clock, processor = [], []
    for _ in range(repeats):
        start, begun = time.perf_counter(), time.process_time()
        work()
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - begun)
    told = {"seconds": statistics.median(clock), "cpu_seconds": statistics.median(processor)}
    return told | {"all": [round(value, 3) for value in clock]}


def whole_index(folder: Path) -> str:
    """The index page of a results folder, tables and pictures read."""
    runs = read_runs(folder)
    return index_page(runs, *gather(runs))


def measure(runs: int, repeats: int, *, pages: bool) -> dict[str, Any]:
    """Seconds for the index alone (tables and pictures read); with `pages`, for all pages too, and again unchanged."""
    with tempfile.TemporaryDirectory() as place:
        folder = study(
            Path(place), MODELS, [f"concept {number}" for number in range(runs // len(MODELS))]
        )
        index = whole_index(folder)  # once unmeasured: imports, copies of pictures
        told = {"runs": runs, "index_bytes": len(index.encode())}
        told["index"] = spent(lambda: whole_index(folder), repeats)
        if pages:
            told["first"] = spent(lambda: build(folder), 1)
            told["again"] = spent(lambda: build(folder), repeats)
    return told


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--pages-up-to", type=int, default=100, help="measure all pages up to so many runs"
    )
    chosen = parser.parse_args()
    found = {
        "locogen": __version__,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "sizes": [],
    }
    Path("runs").mkdir(exist_ok=True)
    for runs in chosen.runs:
        found["sizes"].append(
            told := measure(runs, chosen.repeats, pages=runs <= chosen.pages_up_to)
        )
        Path("runs/report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(
            f"{runs} runs, index of {told['index_bytes'] / 1e6:.2f} MB; seconds (of the processor):",
            end="",
        )
        for name in ("index", "first", "again"):
            if name in told:
                print(
                    f" {name} {told[name]['seconds']:.1f} ({told[name]['cpu_seconds']:.1f})", end=""
                )
        print(flush=True)


if __name__ == "__main__":
    main()
