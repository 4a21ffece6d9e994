"""What a study will cost: pictures are counted where a plan can be made, seconds estimated from finished runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from locogen.catalog import concept
from locogen.plan import Concept, PromptPair, sweep
from locogen.studies.keys import entry_named
from locogen.studies.planning import Planned
from locogen.studies.records import read_record

# Parameters on which a run's number of pictures does not depend.
_NO_MATTER = (
    "model",
    "concept",
    "concepts_file",
    "prompt",
    "target",
    "text",
    "store",
    "scorer",
    "device",
    "dtype",
)


class Costs:
    """What finished runs have cost, and what other runs like them will cost.

    Runs are alike in time when they execute the same notebook on the same model. A run whose
    pictures can be counted costs that count times the seconds per picture so far; any other costs
    the median of the runs like it.
    """

    def __init__(self, results: Path) -> None:
        self.finished: list[Mapping[str, Any]] = []  # facts of `result.json`
        self._counts: dict[str, int | None] = {}  # a run's key → pictures of its sweep
        for file in sorted(results.glob("*/result.json")):
            self.add(read_record(file).facts)

    def add(self, result: Mapping[str, Any]) -> None:
        """Take a finished run into account, unless its time says nothing about others.

        That is so when all of its pictures were in the store already.
        """
        has_worked = result.get("made") or not result.get("pictures")
        if result.get("seconds") and has_worked:
            self.finished.append(result)

    def pictures(self, run: Planned) -> int | None:
        """How many pictures the run needs, or None where that is not known yet.

        A sweep is counted; other notebooks need as many as finished runs with the same parameters,
        whatever their subject was.
        """
        if run.key not in self._counts:
            is_sweep = run.notebook.stem == "localize"
            self._counts[run.key] = _sweep_length(run) if is_sweep else None
        count = self._counts[run.key]
        if count is not None:
            return count

        parameters = _relevant(run.parameters)
        counts: list[int] = []
        for result in self._alike(run):
            if result.get("made") and _relevant(result["parameters"]) == parameters:
                counts.append(result["made"])
        return round(statistics.median(counts)) if counts else None

    def seconds(self, run: Planned) -> float | None:
        """How long the run will take in a worker of its own; None if no run like it is finished."""
        alike = self._alike(run)
        if not alike:
            return None
        seconds = [result["seconds"] for result in alike]
        total = sum(result.get("made", 0) for result in alike)
        count = self.pictures(run) if total else None
        # With pictures on both sides, the share of a picture; it also holds for longer runs.
        if count:
            return count * sum(seconds) / total
        return statistics.median(seconds)

    def left(self, runs: Iterable[Planned], workers: int) -> float | None:
        """Seconds until all of these are done; None while one of them cannot be estimated."""
        each = [self.seconds(run) for run in runs]
        estimates = [seconds for seconds in each if seconds is not None]
        if len(estimates) < len(each):
            return None
        # A run is not divided among workers, so the longest one is a lower bound.
        return max(sum(estimates) / max(workers, 1), *estimates, 0.0)

    def _alike(self, run: Planned) -> list[Mapping[str, Any]]:
        """Finished runs of the notebook, of the same model if there are any such."""
        model = run.parameters.get("model", "")
        same_notebook: list[Mapping[str, Any]] = []
        for result in self.finished:
            if result.get("notebook") == run.notebook.stem and result.get("parameters"):
                same_notebook.append(result)
        same_model = [result for result in same_notebook if result.get("model") == model]
        return same_model or same_notebook


def _relevant(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a run's number of pictures depends on."""
    return {name: value for name, value in parameters.items() if name not in _NO_MATTER}


def _sweep_length(run: Planned) -> int | None:
    """The number of rows of `localize`'s plan, or None where it cannot be known.

    That is so for a model whose layers the catalog does not know, and for another notebook of the
    same name that has not the same parameters.
    """
    entry = entry_named(run.value("model"))
    prompts = _count_prompts(run)
    if entry is None or entry.layers is None or prompts is None:
        return None

    # 0 or nothing stands for "as is usual" in our notebooks; in others it could be any text.
    seeds = run.value("seeds")
    window = run.value("window") or entry.window
    limit = run.value("max_prompts") or prompts
    if not all(type(number) is int for number in (seeds, window, limit)):
        return None
    if seeds < 1:
        return None

    # The plan of one pair of prompts; it has the same length for every subject.
    subject = Concept("x", "style", (PromptPair("x", "y"),))
    rows = sweep(subject, n_layers=entry.layers, window=window, seeds=range(seeds))
    return min(prompts, limit) * len(rows)


def _count_prompts(run: Planned) -> int | None:
    """How many pairs of prompts the run compares; None for one without a subject."""
    if run.value("prompt"):
        return 1
    name = run.value("concept")
    if not name:
        return None
    file = run.value("concepts_file")
    return len(concept(name, file=run.base / file if file else None).pairs)


def duration(seconds: float) -> str:
    """Seconds in words for a person: 8 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
