"""What a study will cost: pictures are counted from plans, seconds estimated from finished runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locogen.catalog import usual_settings
from locogen.plan import Concept, PromptPair, sweep
from locogen.studies.keys import concept_of, entry_named, layers_of
from locogen.studies.planning import Planned
from locogen.studies.records import read_record

# Parameters on which a run's number of pictures does not depend.
_NO_MATTER = (
    "model",
    "concept",
    "concepts_file",
    "models_file",
    "prompt",
    "target",
    "text",
    "store",
    "scorer",
    "device",
    "dtype",
)


@dataclass(frozen=True)
class _Finished:
    """What a finished run has cost: the part of its `result.json` that matters here."""

    notebook: str
    model: str
    parameters: Mapping[str, Any]
    seconds: float
    pictures: int


class Costs:
    """What finished runs have cost, and what other runs like them will cost.

    Runs are alike in time when they execute the same notebook on the same model. A run whose
    pictures can be counted costs that count times the seconds per picture so far; any other costs
    the median of the runs like it.
    """

    def __init__(self, results: Path) -> None:
        self.finished: list[_Finished] = []
        self._sweeps: dict[str, int | None] = {}  # a run's key → pictures of its sweep
        for file in sorted(results.glob("*/result.json")):
            self.add(read_record(file).facts)

    def add(self, result: Mapping[str, Any]) -> None:
        """Take a finished run into account, if it says how long others will take.

        Args:
            result: The facts of its `result.json`.
        """
        # One that found all of its pictures in the store took no time that could be compared.
        has_worked = result.get("made") or not result.get("pictures")
        if not has_worked or not result.get("seconds") or not result.get("parameters"):
            return
        finished = _Finished(
            notebook=result.get("notebook", ""),
            model=result.get("model", ""),
            parameters=result["parameters"],
            seconds=result["seconds"],
            pictures=result.get("made", 0),
        )
        self.finished.append(finished)

    def pictures(self, run: Planned) -> int | None:
        """How many pictures the run needs, or None where that is not known yet."""
        # The plan of a sweep can be made without a model, so its rows are counted.
        if run.key not in self._sweeps:
            is_sweep = run.notebook.stem == "localize"
            self._sweeps[run.key] = _sweep_length(run) if is_sweep else None
        length = self._sweeps[run.key]
        if length is not None:
            return length

        # Others need as many as finished runs with the same parameters, whatever their subject was.
        parameters = _relevant(run.parameters)
        counts: list[int] = []
        for other in self._alike(run):
            if other.pictures and _relevant(other.parameters) == parameters:
                counts.append(other.pictures)
        return round(statistics.median(counts)) if counts else None

    def seconds(self, run: Planned) -> float | None:
        """How long the run will take in a worker of its own; None if no run like it is finished."""
        alike = self._alike(run)
        if not alike:
            return None
        seconds = [other.seconds for other in alike]
        pictures = sum(other.pictures for other in alike)
        count = self.pictures(run)

        # Seconds per picture hold for a run that needs more pictures than any before.
        if pictures and count:
            return count * sum(seconds) / pictures
        return statistics.median(seconds)

    def left(self, runs: Iterable[Planned], workers: int) -> float | None:
        """Seconds until all of these are done; None while one of them cannot be estimated."""
        estimates: list[float] = []
        for run in runs:
            seconds = self.seconds(run)
            if seconds is None:
                return None
            estimates.append(seconds)
        # A run is not divided among workers, so the longest one is a lower bound.
        return max(sum(estimates) / max(workers, 1), *estimates, 0.0)

    def _alike(self, run: Planned) -> list[_Finished]:
        """Finished runs of the notebook, of the same model if there are any such."""
        model = run.parameters.get("model", "")
        same_notebook = [other for other in self.finished if other.notebook == run.notebook.stem]
        same_model = [other for other in same_notebook if other.model == model]
        return same_model or same_notebook


def _relevant(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a run's number of pictures depends on."""
    return {name: value for name, value in parameters.items() if name not in _NO_MATTER}


def _sweep_length(run: Planned) -> int | None:
    """The number of rows of `localize`'s plan, about, or None where it cannot be known.

    That is so for a model whose layers the catalog does not know, and for another notebook of the
    same name that has not the same parameters.
    """
    values = run.values()
    entry = entry_named(values, run.base)
    layers = layers_of(values, run.base)
    prompts = _count_prompts(values, run.base)
    if layers is None or prompts is None:
        return None

    # 0 or nothing stands for "as is usual" in our notebooks; in others it could be any text.
    seeds: Any = values.get("seeds")
    window: Any = values.get("window") or (entry.window if entry else usual_settings("")["window"])
    limit = values.get("max_prompts") or prompts
    if not all(type(number) is int for number in (seeds, window, limit)):
        return None
    if seeds < 1:
        return None

    # The plan of one pair of prompts; it has the same length for every subject.
    subject = Concept("x", "style", (PromptPair("x", "y"),))
    rows = sweep(subject, n_layers=layers, window=window, seeds=range(seeds))
    search = values.get("search", "all")
    return _searched_length(search, len(rows) * min(prompts, limit), min(prompts, limit) * seeds)


def _searched_length(search: str, every: int, pairs: int) -> int | None:
    """About how many pictures a search makes of `every` picture of a sweep; None: unknown."""
    if search != "attribute":
        return every if search == "all" else None  # a race depends on what it sees
    # Baseline, ceiling and placebo, two windows, and an insert; of the others one at random each.
    # What proposes and chooses is a few more, and a sampled window that may be better, too.
    windows = every // pairs // 2 - 1
    return 6 * pairs + min(pairs, windows)


def _count_prompts(values: Mapping[str, Any], base: Path) -> int | None:
    """How many pairs of prompts a run compares; None for one without a subject."""
    if values.get("prompt"):
        return 1
    subject = concept_of(values, base)
    return len(subject.pairs) if subject else None


def duration(seconds: float) -> str:
    """Seconds in words for a person: 8 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
