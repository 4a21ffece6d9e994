"""What a study will cost: pictures counted where a plan can be made, seconds from the runs so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from locogen.catalog import concept, model_entries
from locogen.plan import Concept, PromptPair, sweep
from locogen.studies.planning import Planned
from locogen.studies.records import read_record


class Costs:
    """What runs of a study have cost so far, and what others of their kind will cost by that measure.

    Runs are alike in time when they execute the same notebook on the same model; a run whose pictures are known
    costs its share of the seconds per picture, any other the median of those alike.
    """

    def __init__(self, results: Path) -> None:
        self.known: list[Mapping[str, Any]] = []
        self._sweeps: dict[str, int | None] = {}  # by the run's key
        for file in sorted(results.glob("*/result.json")):
            self.add(read_record(file).facts)

    def add(self, result: Mapping[str, Any]) -> None:
        """Take a finished run into account; one that found its pictures in the store says nothing about time."""
        if result.get("seconds") and (result.get("made") or not result.get("pictures")):
            self.known.append(result)

    def pictures(self, run: Planned) -> int | None:
        """How many pictures the run looks at: a sweep is counted, others are as the same run on another subject."""
        if run.key not in self._sweeps:
            self._sweeps[run.key] = _swept(run) if run.notebook.stem == "localize" else None
        if (count := self._sweeps[run.key]) is not None:
            return count
        same = [
            told
            for told in self._alike(run)
            if _setting(told["parameters"]) == _setting(run.parameters)
        ]
        counts = [told["made"] for told in same if told.get("made")]
        return round(statistics.median(counts)) if counts else None

    def seconds(self, run: Planned) -> float | None:
        """How long the run will take in a worker of its own; None where nothing like it has been run."""
        alike = self._alike(run)
        if not alike:
            return None
        made = sum(told.get("made", 0) for told in alike)
        if made and (count := self.pictures(run)):
            return count * sum(told["seconds"] for told in alike) / made
        return statistics.median(told["seconds"] for told in alike)

    def _alike(self, run: Planned) -> list[Mapping[str, Any]]:
        """Finished runs of the notebook, on the same model where there are such."""
        same = [
            told
            for told in self.known
            if told.get("notebook") == run.notebook.stem and told.get("parameters")
        ]
        return [
            told for told in same if told.get("model") == run.parameters.get("model", "")
        ] or same

    def left(self, runs: Iterable[Planned], workers: int) -> float | None:
        """Seconds until all of these are done; None while one of them cannot be told."""
        each = [self.seconds(run) for run in runs]
        known = [seconds for seconds in each if seconds is not None]
        if len(known) < len(each):
            return None
        return max(sum(known) / max(workers, 1), *known, 0.0)


def _setting(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's number of pictures depends on, its subject left out."""
    apart = (
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
    return {name: value for name, value in parameters.items() if name not in apart}


def _swept(run: Planned) -> int | None:
    """The rows of `localize`'s plan; None for a model of which the catalog does not know the layers.

    None too for a notebook of one's own that has the name, but not the parameters.
    """
    seeds, window, most = (run.value(name) for name in ("seeds", "window", "max_prompts"))
    if not (run.value("prompt") or run.value("concept")) or any(
        type(n or 0) is not int for n in (seeds, window, most)
    ):
        return None
    entry = next((entry for entry in model_entries() if entry.name == run.value("model")), None)
    if entry is None or entry.layers is None or not seeds or seeds < 1:
        return None
    pairs = 1
    if not run.value("prompt"):
        own = run.value("concepts_file")
        pairs = len(concept(run.value("concept"), file=run.base / own if own else None).pairs)
    one = Concept("x", "style", (PromptPair("x", "y"),))  # a sweep is as long whatever it is about
    rows = sweep(one, n_layers=entry.layers, window=window or entry.window, seeds=range(seeds))
    return min(pairs, most or pairs) * len(rows)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
