"""LocoGen: generate every window of layers and score it: `localize(pipe, concept) -> Run`."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from locogen.errors import LocogenError
from locogen.localization.effects import carrier, effect, score_used
from locogen.localization.racing import BUDGET, Rows, race, run_races
from locogen.models.defaults import settings_for, window_for
from locogen.models.families import check_known
from locogen.models.layers import find_layers
from locogen.phrasings import neighbor_texts
from locogen.pictures.fingerprint import same_weights
from locogen.pictures.runs import Run, generate
from locogen.pictures.score import probabilities, scorer_for
from locogen.plan import Concept, Pooled, PromptPair, Settings, distinct_seeds, sweep
from locogen.types import Pipeline

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.score import Scorer

SCORED_AT_ONCE = 256  # pictures
AUTO_WIDTHS = (1, 2, 3)  # of window="auto", in this order
# Kinds of verdicts with which window="auto" is content; wider windows may decide the others.
DECIDED = ("one place", "each necessary", "each sufficient", "nobody")
FIRST_COLUMNS = (
    *("concept", "kind", "role", "prompt", "target", "text", "start", "width", "seed", "edit"),
    *("image", "clip_score", "content_score", "probability"),
)
Array = np.ndarray[Any, Any]


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
    search: Literal["all", "race"] = "all",
    budget: float = BUDGET,
    store: str | Path | None = None,
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
            or places, 2, then 3, each concept by its own evidence. The table has the last width
            that was needed.
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
        budget: Largest share of the exhaustive search's pictures that a race makes.
        store: Folder for the pictures; what it holds is not made again. None: a temporary folder.
        progress: Whether to show a progress bar.

    Returns:
        A `Run`: its pictures, its plan, and the pictures table, one row an image.

    Raises:
        LocogenError: For a concept that the tokenizer does not know, a window larger than the
            model, no or repeated seeds, a race with too few seeds or with timesteps, and as
            `generate` does.

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
        check_known(pipe, one)
        for pair in one.pairs:
            neighbor_texts(one, pair)  # a name without a place should not cost a sweep
    spans = tuple(timesteps)
    if search not in ("all", "race"):
        raise LocogenError(f"search is {search!r}: use 'all' or 'race'")
    if spans and search == "race":
        raise LocogenError("a race looks at no timesteps: use search='all' for them")
    if window == "auto" and search == "race":
        raise LocogenError("a race has one width: give window= a number, or use search='all'")

    settings = settings_for(
        pipe,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    )
    n_layers = len(find_layers(pipe))
    rows: dict[str, Any] = {"n_layers": n_layers, "seeds": distinct_seeds(seeds)}
    rows |= {"controls": controls, "pooled": pooled}
    # The scorer comes before the pictures: what is wrong with it should not cost a sweep.
    judge = scorer_for(pipe, scorer)
    pictures = _ScoredPictures(pipe, concepts, judge, settings, store, progress)

    facts: dict[str, Any] = {"n_layers": n_layers, "search": search}
    if window == "auto":
        rows |= {"timesteps": spans}
        return _stored(pictures, lambda stored: _by_evidence(stored, rows, facts))
    width = window_for(pipe, window)
    rows["window"] = width
    facts["window"] = width
    if search == "all":
        plans = {i: list(sweep(c, timesteps=spans, **rows)) for i, c in enumerate(concepts)}
        run = pictures.of(plans)
        return run.with_table(run.table, **facts)
    races = [race(c, budget=budget, **rows) for c in concepts]
    with same_weights():  # the model's weights are hashed once, not at every look
        run = _stored(pictures, lambda stored: _run_races(races, stored))
    return run.with_table(run.table, budget=budget, **facts)


@dataclass(frozen=True)
class _ScoredPictures:
    """Makes and scores the rows of plans, always with the same pipeline and settings."""

    pipe: Pipeline
    concepts: Sequence[Concept]
    scorer: Scorer
    settings: Settings
    store: str | Path | None
    progress: bool

    def of(self, plans: Mapping[int, Rows]) -> Run:
        """One scored run of all plans. `plans`: {number of the concept: rows}."""
        rows = [row for plan in plans.values() for row in plan]
        settings = self.settings.as_dict()
        run = generate(self.pipe, rows, store=self.store, progress=self.progress, **settings)
        table = run.table.assign(**self._scored_against(plans))
        beside = self._beside(plans)
        table = table.assign(**score_columns(run, table, self.scorer, beside=beside))
        return run.with_table(in_reading_order(table), **self.scorer.settings)

    def scores_of(self, plans: Mapping[int, Rows]) -> dict[int, Array]:
        """The scores of each plan's rows, {number of the concept: (rows,)}."""
        table = self.of(plans).table
        scores = table[score_used(table)].to_numpy()
        ends = np.cumsum([len(rows) for rows in plans.values()])
        return dict(zip(plans, np.split(scores, ends[:-1]), strict=True))

    def _beside(self, plans: Mapping[int, Rows]) -> list[Beside]:
        """For each row, the texts that its picture is compared with."""
        rows: list[Beside] = []
        for number, plan in plans.items():
            concept = self.concepts[number]
            of_prompt = {pair.prompt: beside(concept, pair) for pair in concept.pairs}
            rows += [of_prompt[row.prompt] for row in plan]
        return rows

    def _scored_against(self, plans: Mapping[int, Rows]) -> dict[str, list[Any]]:
        """Columns that say what each row is about and what its picture is scored against."""
        columns: dict[str, list[Any]] = {}
        for name in ("concept", "kind", "pair", "text", "content"):
            columns[name] = []
        for number, plan in plans.items():
            concept = self.concepts[number]
            places = {pair.prompt: i for i, pair in enumerate(concept.pairs)}
            for row in plan:
                place = places[row.prompt]
                pair = concept.pairs[place]
                columns["concept"].append(concept.name)
                columns["kind"].append(concept.kind)
                columns["pair"].append(place)
                columns["text"].append(concept.scored_text(pair))
                columns["content"].append(concept.content_text(pair))
        return columns


def _run_races(races: Sequence[Any], pictures: _ScoredPictures) -> Run:
    """The rows that races ask for, made and scored look by look; then all of them as one run.

    The table gets the verdict on each row (`racing.race`).
    """
    import pandas as pd

    results = run_races(races, pictures.scores_of)
    run = pictures.of({number: rows for number, (rows, _) in enumerate(results)})
    verdicts = pd.DataFrame([verdict for _, lines in results for verdict in lines])
    verdicts = verdicts.astype({"looked": "Int64", "sure": float})
    return run.with_table(run.table.assign(**{name: verdicts[name] for name in verdicts}))


def _by_evidence(pictures: _ScoredPictures, rows: Mapping[str, Any], facts: Any) -> Run:
    """Each concept's sweep of the narrowest windows at which the verdict names places."""
    concepts = pictures.concepts
    plans: dict[int, Rows] = {}
    open_yet = list(range(len(concepts)))
    tried = [width for width in AUTO_WIDTHS if width <= rows["n_layers"]]
    for width in tried:
        for number in open_yet:
            plans[number] = list(sweep(concepts[number], window=width, **rows))
        table = pictures.of({number: plans[number] for number in open_yet}).table
        names = {concepts[number].name: number for number in open_yet}
        for name, part in table.groupby("concept", sort=False):
            if carrier(effect(part)).kind in DECIDED:
                open_yet.remove(names[str(name)])
        if not open_yet:
            break
    run = pictures.of(plans)  # read from the store
    widest = int(run.table["width"].max())
    return run.with_table(run.table, window=widest, **facts)


def _stored(pictures: _ScoredPictures, make: Callable[[_ScoredPictures], Run]) -> Run:
    """A run that reads its pictures more than once: with a temporary store where there is none."""
    if pictures.store is not None:
        return make(pictures)
    folder = tempfile.mkdtemp(prefix="locogen-")
    try:
        run = make(replace(pictures, store=folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # The run's pictures are read from the folder: it goes when they do.
    weakref.finalize(run.pictures, shutil.rmtree, folder, ignore_errors=True)
    return run


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


class Beside(NamedTuple):
    """What a picture is compared with: its concept's neighbors in the form of the scored text."""

    texts: tuple[str, ...]
    has_old_answer: bool  # of a fact: the first of the texts


def beside(concept: Concept, pair: PromptPair) -> Beside:
    """The texts that pictures of a pair are compared with; none where no neighbors are named."""
    texts = neighbor_texts(concept, pair)
    has_old_answer = bool(texts) and concept.kind == "fact" and concept.answer is not None
    return Beside(texts, has_old_answer)


def score_columns(
    run: Run, table: pd.DataFrame, scorer: Scorer, *, beside: Sequence[Beside] = ()
) -> dict[str, Array]:
    """The columns `clip_score`, `content_score` and, with `beside`, `probability`.

    `table`: the columns `text` and `content` say what each picture is scored against. `beside`:
    what each is compared with.
    """
    # Facts have nothing that should stay: they are scored against "", and the score is dropped.
    has_no_content = table["content"].isna().to_numpy()
    texts = list(table["text"])
    contents = list(table["content"].fillna(""))
    scale: Any = scorer.settings.get("logit_scale")
    scores: list[Array] = []
    content_scores: list[Array] = []
    probable: list[Array] = []
    # In parts, so that not all pictures are in memory at once.
    for start in range(0, len(run), SCORED_AT_ONCE):
        part = slice(start, start + SCORED_AT_ONCE)
        compared = [] if scale is None else list(beside[part])
        neighbors = _padded(texts[part], compared)
        score, content_score, *others = scorer(
            run.pictures[part], texts[part], contents[part], *neighbors
        )
        scores.append(score)
        content_scores.append(content_score)
        if compared:
            probable.append(_probability(np.stack([score, *others]), compared, scale))
    content = np.concatenate(content_scores)
    columns = {
        "clip_score": np.concatenate(scores),
        "content_score": np.where(has_no_content, np.nan, content),
    }
    if beside:
        unknown = np.full(len(content), np.nan)
        columns["probability"] = np.concatenate(probable) if probable else unknown
    return columns


def _padded(texts: Sequence[str], compared: Sequence[Beside]) -> list[list[str]]:
    """Lists of neighbors' texts, one text a picture in each; its own text where it has no more."""
    most = max((len(each.texts) for each in compared), default=0)
    lists = []
    for place in range(most):
        line = []
        for own, each in zip(texts, compared, strict=True):
            line.append(each.texts[place] if place < len(each.texts) else own)
        lists.append(line)
    return lists


def _probability(cosines: Array, compared: Sequence[Beside], scale: float) -> Array:
    """Probability of each picture's own text among its neighbors', (pictures,).

    `cosines`: own text first, (texts, pictures). Of a fact, the mean of "the new answer has come"
    and "the old one is gone": losing the old answer counts, not only the arrival of the new one.
    NaN without neighbors.
    """
    counts = np.array([len(each.texts) for each in compared])  # (pictures,)
    is_padding = np.arange(len(cosines))[:, None] > counts
    shares = probabilities(np.where(is_padding, np.nan, cosines), scale)  # (texts, pictures)
    own = shares[0]
    has_old = np.array([each.has_old_answer for each in compared])
    old = shares[min(1, len(shares) - 1)]  # the old answer is the first neighbor
    probable = np.where(has_old, (own + 1 - old) / 2, own)
    return np.where(counts > 0, probable, np.nan)


def in_reading_order(table: pd.DataFrame) -> Any:
    """The table with the columns that all runs share first."""
    others = [column for column in table.columns if column not in FIRST_COLUMNS]
    first = [column for column in FIRST_COLUMNS if column in table]
    return table[[*first, *others]]
