"""Localizers asked about planted models: `benchmark(localizers, plants) -> Benchmark`.

Every answer is a cell: plant × concept × setting × localizer, one JSON file of the store as soon as
it is there. So a run that is killed loses one cell at most, and several processes may share a
store.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen.benchmarks.answers import Answer, by_layer
from locogen.benchmarks.faithfulness import circuit_scores
from locogen.benchmarks.localizers import LOCALIZERS, Localizer
from locogen.benchmarks.scores import (
    costs,
    kinds_answered,
    measures,
    places_of,
    places_text,
    scores,
    share_at,
)
from locogen.benchmarks.subjects import (
    grown,
    identity,
    ids_to_ask,
    load_plant,
    plants_to_ask,
    truth_of,
    weightless,
)
from locogen.catalog.concepts import concept as concept_of
from locogen.catalog.plants import Plant
from locogen.errors import LocogenError, unknown
from locogen.files import load_json, write_json
from locogen.models.defaults import settings_for
from locogen.models.families import denoiser_of
from locogen.models.hooks import before, hooked, is_dry_run
from locogen.models.layers import find_layers
from locogen.pictures.store import content_key
from locogen.plan import parse_names
from locogen.types import Pipeline

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1  # of a cell; raised when its meaning changes
_CODE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, eq=False)
class Benchmark:
    """What localizers said of planted models, from `benchmark`.

    Attributes:
        table: One row a plant, concept, setting and localizer: what is planted (`rule`, `truth`,
            the right kind, `planted`, the places, `strength`), the answer (`kind`, `places`,
            `side`, `share` at the planted place, `reason`), every measure of
            `locogen.benchmarks.scores.MEASURES`, and the costs.
        settings: What was asked.
    """

    table: pd.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)

    def scores(self) -> pd.DataFrame:
        """Every measure by localizer and setting, with 95 % intervals over plants."""
        return scores(self.table)

    def by_rule(self) -> pd.DataFrame:
        """The same for each rule of planting apart."""
        return scores(self.table, by=("rule",))

    def kinds(self) -> pd.DataFrame:
        """How often each kind of answer was given, by localizer and right kind."""
        return kinds_answered(self.table)

    def costs(self) -> pd.DataFrame:
        """Pictures, denoiser rows and seconds of one answer on average, by localizer."""
        return costs(self.table)

    def _repr_html_(self) -> str:
        plants = self.table["plant"].nunique()
        settings = " · ".join(f"{name} {value}" for name, value in self.settings.items())
        wide = self.scores().pivot_table(index="localizer", columns="measure", values="value")
        count = f"{len(self.table)} answers about {plants} planted models"
        return f"<p><b>Benchmark</b> of {count}</p><p>{settings}</p>{wide.round(2)._repr_html_()}"


@dataclass(frozen=True)
class _Setting:
    """How localizers are asked."""

    window: int
    guidance_scale: float | None
    prompts: int
    seeds: int


@dataclass(frozen=True)
class _Machine:
    """Where models run, and how many pictures at once; None: the usual."""

    device: str | None
    batch_size: int | None


@dataclass(frozen=True)
class _Group:
    """All cells of one plant, concept and setting: they share pictures."""

    plant: Plant
    concept: str
    setting: _Setting


def benchmark(
    localizers: Mapping[str, Localizer | None] | Sequence[str] | str | None = None,
    plants: Sequence[str | Plant] | str | None = None,
    *,
    windows: Iterable[int] = (2,),
    guidance_scales: Iterable[float | None] = (None,),
    sizes: Iterable[tuple[int, int]] = ((2, 4),),
    concepts: int | None = None,
    circuits: bool = True,
    device: str | None = None,
    batch_size: int | None = None,
    store: str | Path | None = None,
    progress: bool = True,
) -> Benchmark:
    """Ask localizers about models whose answer is known, and score what they say.

    Args:
        localizers: Names of localizers, or one text with commas; or a mapping from a name to your
            own function (None: the one of that name); None: all. A function takes a pipeline, a
            concept and the keywords window, seeds, guidance_scale, store and progress, as
            `localize` does, and returns a `locogen.benchmarks.answers.Answer`. What it may not do
            is look up the plant.
        plants: Names of planted models (see `plants`), or one text with commas; "tune", "report",
            or None for all. Of a set, those whose weights are not there are left out; the result's
            `settings` name them.
        windows: Widths of the windows.
        guidance_scales: Classifier-free guidance; None: the catalog's value.
        sizes: Pairs (prompts, seeds).
        concepts: At most so many concepts of each plant; None: all.
        circuits: Whether to make the pictures that tell how much the best layers of each ranking
            bring by themselves (CPR, CMD): 5 × prompts × 2 more for each ranking.
        device: Where the models run; None: as `load` chooses.
        batch_size: Pictures at once, handed to the localizers as one more keyword: hundreds suit
            a GPU. None: each takes what it usually takes.
        store: Folder for the answers and pictures; answers that it holds are not asked for again.
            Several processes may share it. None: a temporary folder.
        progress: Whether to show a progress bar.

    Returns:
        The `Benchmark`: its table, and scores with intervals.

    Raises:
        LocogenError: For an unknown localizer or plant, a window wider than a model, weights that
            are not there, or an answer of another type.

    Example:
        >>> few = {"plants": ["deaf-in-mini"], "sizes": [(1, 1)], "concepts": 1}
        >>> blind = benchmark(["constant"], **few, circuits=False, progress=False)
        >>> blind.table[["truth", "kind", "right_kind"]].to_dict("records")
        [{'truth': 'nobody', 'kind': 'one place', 'right_kind': 0.0}]
    """
    functions = _functions(localizers)
    asked_plants = plants_to_ask(plants)
    settings = [
        _Setting(width, guidance, prompts, seeds)
        for width in windows
        for guidance in guidance_scales
        for prompts, seeds in sizes
    ]
    _check_windows(settings, asked_plants)
    groups = [
        _Group(plant, id, setting)
        for plant in asked_plants
        for id in ids_to_ask(plant, concepts)
        for setting in settings
    ]
    if not groups:
        raise LocogenError("there is nothing to ask: give plants with concepts, and settings")
    machine = _Machine(device, batch_size)
    if store is None:
        with tempfile.TemporaryDirectory(prefix="locogen-") as folder:
            cells = _Work(functions, Path(folder), circuits, machine, progress).all_of(groups)
    else:
        cells = _Work(functions, Path(store), circuits, machine, progress).all_of(groups)
    facts = {"plants": len(asked_plants), "localizers": ", ".join(functions), "circuits": circuits}
    facts["without weights"] = ", ".join(weightless()) or "none"
    return Benchmark(_table(groups, cells), facts)


def _functions(choice: Any) -> dict[str, Localizer]:
    """Name → function of the localizers that were chosen."""
    if choice is None:
        return dict(LOCALIZERS)
    if isinstance(choice, str):
        choice = parse_names(choice, "localizers", LOCALIZERS)
    if not isinstance(choice, Mapping):
        choice = dict.fromkeys(choice)
    functions = {}
    for name, function in choice.items():
        if function is None and name not in LOCALIZERS:
            raise unknown("localizer", name, LOCALIZERS)
        functions[name] = LOCALIZERS[name] if function is None else function
    if not functions:
        raise LocogenError("there are no localizers: name some, or leave localizers=None for all")
    return functions


def _check_windows(settings: Sequence[_Setting], plants: Sequence[Plant]) -> None:
    """Refuse a window that is wider than a model, before its weights are loaded."""
    for setting in settings:
        for plant in plants:
            if setting.window > plant.layers:
                raise LocogenError(
                    f"windows has {setting.window}: {plant.name} has {plant.layers} layers"
                )


# --- cells ---------------------------------------------------------------------------------------


class _Work:
    """Cells made, or read where the store has them."""

    def __init__(
        self,
        functions: Mapping[str, Localizer],
        store: Path,
        circuits: bool,
        machine: _Machine,
        progress: bool,
    ) -> None:
        self.functions = functions
        self.store = store
        self.circuits = circuits
        self.machine = machine
        self.progress = progress
        self.versions = {name: _code_of(function) for name, function in functions.items()}
        self._loaded: tuple[Plant, Pipeline] | None = None

    def all_of(self, groups: Sequence[_Group]) -> list[dict[str, dict[str, Any]]]:
        """The cells of every group, {localizer: cell}."""
        from filelock import FileLock, Timeout
        from tqdm.auto import tqdm

        # What another process is at is left for later, and waited for at the end.
        waiting = list(groups)
        bar = tqdm(total=len(waiting), desc="asking", unit=" concepts", disable=not self.progress)
        with bar:
            for patience in (0, -1):
                busy = []
                for group in waiting:
                    lock = FileLock(self._lock(group))
                    try:
                        lock.acquire(timeout=patience)
                    except Timeout:
                        busy.append(group)
                        continue
                    try:
                        self._fill(group)
                    finally:
                        lock.release()
                    bar.update()
                waiting = busy
        return [self._read(group) for group in groups]

    def _lock(self, group: _Group) -> Path:
        folder = self.store / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self._key(group, 'lock')}.lock"

    def _key(self, group: _Group, localizer: str) -> str:
        parts = {
            "format": FORMAT,
            "plant": group.plant.name,
            "model": identity(group.plant),
            "concept": group.concept,
            "setting": vars(group.setting),
            "circuits": self.circuits,
            "localizer": localizer,
            "code": self.versions.get(localizer, ""),
        }
        return content_key(parts)

    def _path(self, group: _Group, localizer: str) -> Path:
        return self.store / "cells" / f"{self._key(group, localizer)}.json"

    def _read(self, group: _Group) -> dict[str, dict[str, Any]]:
        """The cells of a group that the store has."""
        cells = {name: load_json(self._path(group, name)) for name in self.functions}
        return {name: cell for name, cell in cells.items() if cell}

    def _fill(self, group: _Group) -> None:
        """Make the cells of a group that are missing."""
        there = self._read(group)
        missing = [name for name in self.functions if name not in there]
        if not missing:
            return
        concept = concept_of(group.concept).first(group.setting.prompts)
        with grown(group.plant, self._pipe(group.plant), concept) as pipe:
            for name in missing:
                cell = self._asked(name, pipe, concept, group.setting)
                path = self._path(group, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, cell)

    def _pipe(self, plant: Plant) -> Pipeline:
        # One model at a time is held.
        if self._loaded is None or self._loaded[0] != plant:
            self._loaded = None
            self._loaded = (plant, load_plant(plant, self.machine.device))
        return self._loaded[1]

    def _asked(self, name: str, pipe: Pipeline, concept: Any, setting: _Setting) -> dict[str, Any]:
        """One localizer's answer about one concept, as plain values."""
        pictures = self.store / "pictures"
        options: dict[str, Any] = {
            "seeds": tuple(range(setting.seeds)),
            "guidance_scale": setting.guidance_scale,
            "store": pictures,
            "progress": False,
        }
        if self.machine.batch_size is not None:
            options["batch_size"] = self.machine.batch_size
        start = time.perf_counter()
        with counting_rows(pipe) as counted:
            answer = _answer(self.functions[name], pipe, concept, setting.window, options)
        seconds = time.perf_counter() - start
        if not isinstance(answer, Answer):
            raise LocogenError(
                f"localizer {name!r} returned {type(answer).__name__}: "
                "return a locogen.benchmarks.answers.Answer"
            )
        layers = None
        if answer.profile is not None:
            layers = by_layer(answer.profile, answer.width)
        cell = _plain(answer) | {"localizer": name, "n_layers": len(find_layers(pipe))}
        cell |= _cost(pipe, answer, counted, setting, seconds)
        cell["layers"] = None if layers is None else layers.tolist()
        if self.circuits and layers is not None:
            cell["circuit"] = circuit_scores(pipe, concept, layers, **options)
        return cell


def _answer(
    function: Localizer, pipe: Pipeline, concept: Any, window: int, options: Mapping[str, Any]
) -> Any:
    """What a localizer says; what it cannot be asked is inconclusive, with the reason."""
    try:
        return function(pipe, concept, window=window, **options)
    except LocogenError as error:
        return Answer("inconclusive", reason=f"it could not be asked: {error}")


def _plain(answer: Answer) -> dict[str, Any]:
    lines = []
    if answer.effects is not None:
        lines = json.loads(str(answer.effects.to_json(orient="records")))
    return {
        "kind": answer.kind,
        "places": places_text(answer.places),
        "reason": answer.reason,
        "side": answer.side,
        "width": answer.width,
        "effects": lines,
    }


@dataclass
class Counted:
    """Rows of the denoiser's batches, and its calls."""

    rows: int = 0
    calls: int = 0


@contextmanager
def counting_rows(pipe: Pipeline) -> Iterator[Counted]:
    """Within the context, count what goes through the denoiser: rows of its batches, and calls."""
    counted = Counted()

    def count(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if is_dry_run():
            return
        first = args[0] if args else next(kwargs[name] for name in _INPUTS if name in kwargs)
        counted.rows += len(first)
        counted.calls += 1

    with hooked([before(denoiser_of(pipe), count, "the denoiser, counted")]):
        yield counted


_INPUTS = ("sample", "hidden_states")  # what denoisers call their noisy pictures


def _cost(
    pipe: Pipeline, answer: Answer, counted: Counted, setting: _Setting, seconds: float
) -> dict[str, Any]:
    """Pictures and rows as if the answer had been asked alone, though it shared some pictures."""
    settings = settings_for(
        pipe,
        num_inference_steps=None,
        guidance_scale=setting.guidance_scale,
        batch_size=1,
    )
    passes = 2 if settings.guidance_scale > 1 else 1
    planned = (answer.pictures or 0) * settings.num_inference_steps * passes
    return {
        "pictures": answer.pictures,
        "rows": max(planned, counted.rows),
        "calls": counted.calls,
        "seconds": seconds,
        "fresh": counted.rows >= planned,
        "guidance_scale": settings.guidance_scale,
    }


def _code_of(function: Callable[..., Any]) -> str:
    """A hash of the code that answers: other code is asked again."""
    if function in LOCALIZERS.values():
        folder = _CODE / "localization"
        files = [*sorted(folder.rglob("*.py")), _CODE / "benchmarks" / "localizers.py"]
        content = b"".join(file.read_bytes() for file in files)
    else:
        try:
            content = inspect.getsource(function).encode()
        except (OSError, TypeError):  # typed in a terminal, or not written in Python
            content = repr(getattr(function, "__qualname__", type(function))).encode()
    return hashlib.sha256(content).hexdigest()


# --- the table -----------------------------------------------------------------------------------


def _table(
    groups: Sequence[_Group], cells: Sequence[Mapping[str, Mapping[str, Any]]]
) -> pd.DataFrame:
    import pandas as pd

    lines = []
    for group, by_localizer in zip(groups, cells, strict=True):
        lines += [_line(group, cell) for cell in by_localizer.values()]
    return pd.DataFrame(lines)


def _line(group: _Group, cell: Mapping[str, Any]) -> dict[str, Any]:
    """One cell with what is known of its plant, and its measures."""
    plant = group.plant
    attribute = concept_of(group.concept).kind
    truth = truth_of(plant, attribute)
    line: dict[str, Any] = {"plant": plant.name, "set": plant.set, "base": plant.base}
    line |= {"attribute": attribute, "concept": group.concept}
    line |= {"rule": plant.plantings[attribute].rule, "truth": truth.kind}
    line |= {"planted": places_text(truth.places), "strength": truth.strength}
    line |= {"true_side": truth.side, "scored": truth.scored, "note": truth.note}
    line |= {"window": group.setting.window, "guidance_scale": cell["guidance_scale"]}
    line |= {"prompts": group.setting.prompts, "seeds": group.setting.seeds}
    for name in ("localizer", "kind", "places", "side", "reason", "n_layers"):
        line[name] = cell[name]
    line |= share_at(truth, cell["effects"], cell["width"])
    circuit = {int(count): score for count, score in cell.get("circuit", {}).items()}
    line |= measures(
        truth,
        cell["kind"],
        places_of(cell["places"]),
        profile=_profile(cell),
        effects=cell["effects"],
        width=cell["width"],
        side=cell["side"],
        circuit=circuit,
    )
    for name in ("pictures", "rows", "calls", "seconds", "fresh"):
        line[name] = cell[name]
    return line


def _profile(cell: Mapping[str, Any]) -> Any:
    import numpy as np

    return None if cell["layers"] is None else np.array(cell["layers"])
