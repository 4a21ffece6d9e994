"""LocoGen: generate every window of layers and score it: `localize(pipe, concept) -> Run`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from locogen.console import open_bar
from locogen.errors import LocogenError
from locogen.files import AUTO
from locogen.localization.attribution.proposal import Proposal, propose
from locogen.localization.attribution.search import Planned, scouts, search
from locogen.localization.effects import carrier, effect
from locogen.localization.racing import BUDGET, race, run_races
from locogen.localization.scored_pictures import ScoredPictures, with_store
from locogen.models.defaults import settings_for, window_for
from locogen.models.families import check_known
from locogen.models.layers import find_layers
from locogen.phrasings import neighbor_texts
from locogen.pictures.default_store import Place
from locogen.pictures.fingerprint import same_weights
from locogen.pictures.runs import Run
from locogen.pictures.score import scorer_for
from locogen.plan import Concept, Intervention, Pooled, distinct_seeds, sweep
from locogen.types import Pipeline

if TYPE_CHECKING:
    from locogen.pictures.score import Scorer

AUTO_WIDTHS = (1, 2, 3)  # of window="auto", in this order
# Kinds of verdicts with which window="auto" is content; wider windows may decide the others.
DECIDED = ("one place", "each necessary", "each sufficient", "nobody")
SEARCHES = ("all", "race", "attribute")
Search = Literal["all", "race", "attribute"]
AT_ONCE = 8  # pictures whose gradients are taken together


def localize(
    pipe: Pipeline,
    concept: Concept | Sequence[Concept],
    *,
    window: int | Literal["auto"] | None = 2,
    seeds: Iterable[int] = range(4),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    scorer: Scorer | str | None = None,
    controls: bool = True,
    timesteps: Iterable[tuple[int, int]] = (),
    pooled: Pooled = "keep",
    search: Search = "all",
    budget: float = BUDGET,
    store: Place = AUTO,
    progress: bool = True,
) -> Run:
    """Find where a concept is: replace each window of layers, and score the pictures.

    LocoGen (Basu et al. 2024, section 4). For each prompt pair and seed it makes the baseline, a
    picture for each window that gets the target prompt, and the controls. Every picture is scored
    against the concept's text, and against what should stay (`content_score`; NaN for facts). Where
    the concept names neighbors, `probability` is that of the concept's text among theirs (softmax
    of the same scorer); of a fact, the mean of "the new answer has come" and "the old one is gone".

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: What to look for, or several concepts with different names.
        window: Number of neighboring layers that get the target together; None: the catalog's
            number for this model. "auto": 1, and where the verdict (`carrier`) then names no place
            or places, 2, then 3, each concept by its own evidence, in every search but a race. The
            table has the last width that was needed; the seeds that judge have chosen it.
        seeds: Random seeds; every prompt is made with each of them.
        num_inference_steps: Denoising steps; None: the catalog's number for this model.
        guidance_scale: Classifier-free guidance; None: the catalog's value for this model.
        batch_size: Pictures made at once.
        scorer: A scorer or its name (see `scorer`); None: the catalog's for this model.
        controls: Whether to make the ceiling (every layer gets the target), the placebo (a
            paraphrase) and the insert of each window (only the window gets the prompt).
        timesteps: Spans (first, last) of denoising steps, counted from 0. Each window is also made
            with its target given during each span alone.
        pooled: For families that also take a pooled text vector: "keep" (layers alone; the ceiling
            then is less than the target's own picture) or "target".
        search: "all": every window on every prompt and seed. "race": drop windows as soon as they
            cannot be the best (see `racing`); the table then has `verdict`, `looked` and `sure`.
            "attribute": gradients propose three windows, whatever the number of layers. The best
            of them, chosen on the seeds that follow yours, and the best that does not overlap it
            are measured with all controls on yours. Of all other windows, pictures drawn at random
            bound what may have been missed: with confidence 95 %, no larger share of their
            pictures than `missed` has at least half of the chosen window's effect.
        budget: Largest share of the exhaustive search's pictures that a race makes. Where it does
            not pay for a first look at every window, those that gradients propose start; what the
            gradients cost is on top of it, and told in the run's settings.
        store: Folder for the pictures; what it holds is not made again. "auto": `store_folder`, in
            this user's cache; None: a temporary folder.
        progress: Whether to show a progress bar.

    Returns:
        A `Run`: its pictures, its plan, and the pictures table, one row an image. Where gradients
        proposed, its `attributions` are what proposed, and its settings have the costs:
        `proposal_rows` (of the denoiser, where a gradient counts three), `choosing_pictures` (which
        are not in the table), and in all `denoiser_rows` and `generations`, as many pictures.

    Raises:
        LocogenError: For a concept that the tokenizer does not know, a window larger than the
            model, no or repeated seeds, a race with too few seeds, timesteps in a search that
            does not look at them, and as `generate` and (search="attribute") `attribute` do.

    Example:
        >>> pipe = load("mini")
        >>> pair = PromptPair("a picture of a cat in the style of neon", "a picture of a cat")
        >>> few = {"seeds": [0], "controls": False, "num_inference_steps": 1, "progress": False}
        >>> run = localize(pipe, Concept("neon", "style", (pair,)), window=8, **few)
        >>> run.table["role"].value_counts().to_dict()
        {'window': 9, 'baseline': 1}
    """
    concepts = _checked_concepts(concept)
    for one in concepts:
        _check_readable(pipe, one)
    spans = tuple(timesteps)
    _check_search(search, window, spans)
    settings = settings_for(
        pipe,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    )
    n_layers = len(find_layers(pipe))
    layout = {"n_layers": n_layers, "seeds": distinct_seeds(seeds)}
    layout |= {"controls": controls, "pooled": pooled}
    # The scorer comes before the pictures: what is wrong with it should not cost a sweep.
    with open_bar(progress, "loading the scorer"):
        judge = scorer_for(pipe, scorer)
        pictures = ScoredPictures(pipe, concepts, judge, settings, store, progress)
        planner = _planner(search, layout, spans, budget)
        facts: dict[str, Any] = {"n_layers": n_layers, "search": search}
        return _found(planner, pictures, _widths(pipe, window, n_layers), facts)


def _planner(
    search: Search, layout: Mapping[str, Any], spans: Sequence[tuple[int, int]], budget: float
) -> _Planner:
    """What decides which rows are made."""
    if search == "all":
        return _Sweeps({**layout, "timesteps": spans})
    if search == "race":
        return _Races(layout, budget, _Gradients(layout))
    return _Proposals(layout, _Gradients(layout))


def _widths(pipe: Pipeline, window: int | Literal["auto"] | None, n_layers: int) -> tuple[int, ...]:
    """The widths of windows, narrowest first."""
    if window == "auto":
        return tuple(width for width in AUTO_WIDTHS if width <= n_layers)
    return (window_for(pipe, window),)


def _check_readable(pipe: Pipeline, concept: Concept) -> None:
    """Raise `LocogenError` for what would be noticed after a sweep."""
    check_known(pipe, concept)
    for pair in concept.pairs:
        neighbor_texts(concept, pair)  # a name without a place


def _check_search(search: str, window: Any, spans: Sequence[Any]) -> None:
    if search not in SEARCHES:
        raise LocogenError(f"search is {search!r}: use 'all', 'race' or 'attribute'")
    if spans and search != "all":
        raise LocogenError(f"search={search!r} looks at no timesteps: use search='all' for them")
    if window == "auto" and search == "race":
        raise LocogenError("a race has one width: give window= a number, or use search='all'")


# --- searches ------------------------------------------------------------------------------------

Plans = dict[int, Planned]  # by number of the concept


class _Planner:
    """Decides which rows are made for concepts, with windows of one width."""

    looks_again = True  # whether it reads pictures more than once

    def plans(self, pictures: ScoredPictures, numbers: Sequence[int], width: int) -> Plans:
        """The rows of the concepts with these numbers."""
        raise NotImplementedError

    def finished(self, run: Run) -> Run:
        """The run, with what the search has to say of itself."""
        return run


@dataclass
class _Sweeps(_Planner):
    """Every window of every concept."""

    layout: Mapping[str, Any]
    looks_again = False

    def plans(self, pictures: ScoredPictures, numbers: Sequence[int], width: int) -> Plans:
        """Whole sweeps."""
        concepts = pictures.concepts
        return {i: Planned(sweep(concepts[i], window=width, **self.layout)) for i in numbers}


@dataclass
class _Gradients:
    """What gradients propose for each concept, and what that costs: see `attribution`."""

    layout: Mapping[str, Any]
    proposals: dict[int, Proposal] = field(default_factory=dict)  # by number of the concept

    def order(self, pictures: ScoredPictures, number: int, width: int) -> tuple[int, ...]:
        """The windows of a concept by their first layers, the most promising first."""
        # Gradients are taken once, whatever the width of windows.
        if number not in self.proposals:
            scout = scouts(pictures.concepts[number], self.layout["seeds"])
            settings = pictures.settings
            self.proposals[number] = propose(
                pictures.pipe,
                scout.concept,
                window=1,
                seeds=scout.seeds,
                pooled=None if self.layout["pooled"] == "target" else "keep",
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                batch_size=min(settings.batch_size, AT_ONCE),
                progress=pictures.progress,
            )
        return self.proposals[number].ranked_at(width)

    def with_costs(self, run: Run, others: set[Any]) -> Run:
        """The run with what proposed, and with all costs; `others`: pictures not in its plan."""
        attributions = [proposal.attribution for proposal in self.proposals.values()]
        rows = sum(one.settings["denoiser_rows"] for one in attributions)
        as_pictures = sum(one.settings["pictures"] for one in attributions)
        in_plan = {_what_makes(row) for row in run.plan}
        pictures = len(in_plan | others)
        costs: dict[str, Any] = {
            "proposal_rows": rows,
            "choosing_pictures": pictures - len(in_plan),
        }
        costs["denoiser_rows"] = rows + round(pictures * rows / as_pictures)
        costs["generations"] = pictures + math.ceil(as_pictures)
        run = run.with_table(run.table, **costs)
        return replace(run, attributions={one.concept: one for one in attributions})


@dataclass
class _Races(_Planner):
    """Windows that leave as soon as they cannot be the best: see `racing`."""

    layout: Mapping[str, Any]
    budget: float
    gradients: _Gradients

    def plans(self, pictures: ScoredPictures, numbers: Sequence[int], width: int) -> Plans:
        """The rows that races ask for, made and scored look by look."""
        options = {**self.layout, "window": width, "budget": self.budget}
        races = []
        for number in numbers:
            # Asked only where the budget does not pay for a look at every window.
            order = partial(self.gradients.order, pictures, number, width)
            races.append(race(pictures.concepts[number], order=order, **options))
        return _side_by_side(races, pictures, numbers)

    def finished(self, run: Run) -> Run:
        """The run with the budget among its settings, and with what proposed."""
        run = run.with_table(run.table, budget=self.budget)
        return self.gradients.with_costs(run, set()) if self.gradients.proposals else run


@dataclass
class _Proposals(_Planner):
    """Windows that gradients propose: see `attribution.search`."""

    layout: Mapping[str, Any]
    gradients: _Gradients
    pictures_made: set[Any] = field(default_factory=set)  # by what makes them

    def plans(self, pictures: ScoredPictures, numbers: Sequence[int], width: int) -> Plans:
        """The rows of the windows that are proposed, and of those that only measuring names."""
        searches = []
        for number in numbers:
            order = self.gradients.order(pictures, number, width)
            concept = pictures.concepts[number]
            searches.append(search(concept, order=order, window=width, **self.layout))
        plans = _side_by_side(searches, pictures, numbers)
        for plan in plans.values():
            self.pictures_made |= {_what_makes(row) for row in (*plan.rows, *plan.others)}
        return plans

    def finished(self, run: Run) -> Run:
        """The run, with what proposed and with all costs."""
        return self.gradients.with_costs(run, self.pictures_made)


def _what_makes(row: Intervention) -> tuple[Any, ...]:
    """What makes a row's picture; the target does not matter where no layer gets it."""
    target = None if row.is_plain else row.target
    return row.prompt, target, row.layers, row.seed


def _side_by_side(
    runners: Sequence[Any], pictures: ScoredPictures, numbers: Sequence[int]
) -> Plans:
    """Run the searches of several concepts so that their rows share batches."""

    def scores_of(requests: Mapping[int, Any]) -> dict[int, Any]:
        # Requests are counted from 0, whatever the numbers of their concepts.
        scores = pictures.scores_of({numbers[place]: rows for place, rows in requests.items()})
        return {place: scores[numbers[place]] for place in requests}

    results = run_races(runners, scores_of)
    return {number: Planned(*result) for number, result in zip(numbers, results, strict=True)}


def _found(
    planner: _Planner, pictures: ScoredPictures, widths: Sequence[int], facts: dict[str, Any]
) -> Run:
    """The run of a search: of one width, or of the narrowest at which verdicts name places."""

    def find(stored: ScoredPictures) -> Run:
        plans = _plans(planner, stored, widths)
        run = _run_of(stored, plans)
        widest = max(row.width or 0 for plan in plans.values() for row in plan.rows)
        return planner.finished(run).with_table(run.table, window=widest, **facts)

    if not planner.looks_again and len(widths) == 1:
        return find(pictures)
    with same_weights():  # the model's weights are hashed once, not at every look
        return with_store(pictures, find)


def _plans(planner: _Planner, pictures: ScoredPictures, widths: Sequence[int]) -> Plans:
    """Each concept's plan, with the narrowest windows at which its verdict names places."""
    numbers = {concept.name: i for i, concept in enumerate(pictures.concepts)}
    plans: Plans = {}
    open_yet = list(numbers.values())
    for width in widths:
        plans |= planner.plans(pictures, open_yet, width)
        if width == widths[-1]:
            break
        table = _run_of(pictures, {number: plans[number] for number in open_yet}).table
        for name, part in table.groupby("concept", sort=False):
            if carrier(effect(part)).kind in DECIDED:
                open_yet.remove(numbers[str(name)])
        if not open_yet:
            break
    return {number: plans[number] for number in sorted(plans)}


def _run_of(pictures: ScoredPictures, plans: Plans) -> Run:
    """All rows of plans as one run, with what a search says of each."""
    import pandas as pd

    run = pictures.of({number: plan.rows for number, plan in plans.items()})
    lines = [line for plan in plans.values() for line in plan.verdicts]
    if not lines:
        return run
    verdicts = pd.DataFrame(lines)
    types = {name: kind for name, kind in _VERDICT_TYPES.items() if name in verdicts}
    verdicts = verdicts.astype(types)
    return run.with_table(run.table.assign(**{name: verdicts[name] for name in verdicts}))


_VERDICT_TYPES = {
    "looked": "Int64",
    "windows": "Int64",
    "sure": float,
    "others": "Int64",
    "sampled": "Int64",
    "hits": "Int64",
    "missed": float,
}


def _checked_concepts(concept: Concept | Sequence[Concept]) -> list[Concept]:
    concepts: list[Any] = [concept] if isinstance(concept, (Concept, str)) else list(concept)
    for stranger in concepts:
        if not isinstance(stranger, Concept):
            raise LocogenError(
                f"expected a Concept, got {stranger!r}: "
                f"use loco.concept({stranger!r}), or make one with loco.Concept(...)"
            )
    names = [concept.name for concept in concepts]
    if not concepts or len(set(names)) < len(names):
        raise LocogenError(
            f"localize was given the concepts {names}: give at least one, and no name twice"
        )
    return concepts
