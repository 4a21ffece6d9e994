"""Pictures of plans, made and scored: a run whose table has scores, for every search."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from locogen.console import current
from locogen.errors import name_interrupt
from locogen.localization.effects import score_used
from locogen.phrasings import neighbor_texts
from locogen.pictures.default_store import Place, place_of
from locogen.pictures.runs import Run, generate
from locogen.pictures.score import probabilities
from locogen.plan import Concept, Intervention, PromptPair, Settings
from locogen.types import Pipeline

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.score import Scorer

SCORED_AT_ONCE = 256  # pictures
FIRST_COLUMNS = (
    *("concept", "kind", "role", "prompt", "target", "text", "start", "width", "seed", "edit"),
    *("image", "clip_score", "content_score", "probability"),
)
Array = np.ndarray[Any, Any]
Rows = Sequence[Intervention]


@dataclass(frozen=True)
class ScoredPictures:
    """Makes and scores the rows of plans, always with the same pipeline and settings."""

    pipe: Pipeline
    concepts: Sequence[Concept]
    scorer: Scorer
    settings: Settings
    store: Place
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
        scores: dict[int, Array] = {}
        start = 0
        for number, plan in plans.items():
            rows = table.iloc[start : start + len(plan)]
            # Concepts with neighbors race on their probability, as `effect` will judge them by it.
            scores[number] = rows[score_used(rows)].to_numpy()
            start += len(plan)
        return scores

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


def with_store(pictures: ScoredPictures, make: Callable[[ScoredPictures], Run]) -> Run:
    """A run that reads its pictures more than once: with a temporary store where there is none."""
    if place_of(pictures.store) is not None:
        return make(pictures)
    folder = tempfile.mkdtemp(prefix="locogen-")
    try:
        run = make(replace(pictures, store=folder))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            name_interrupt(error, "stopped; without a store no picture is kept", anew=True)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # The run's pictures are read from the folder: it goes when they do.
    weakref.finalize(run.pictures, shutil.rmtree, folder, ignore_errors=True)
    return run


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
        current().say(f"scoring picture {start + 1} of {len(run)}")
        compared = [] if scale is None else list(beside[part])
        neighbors = _padded(texts[part], compared)
        score, content_score, *others = scorer(
            run.pictures[part], texts[part], contents[part], *neighbors
        )
        scores.append(score)
        content_scores.append(content_score)
        if compared and scale is not None:
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
        for text, each in zip(texts, compared, strict=True):
            line.append(each.texts[place] if place < len(each.texts) else text)
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
    scored = shares[0]  # of the text that pictures are scored against
    has_old = np.array([each.has_old_answer for each in compared])
    old = shares[min(1, len(shares) - 1)]  # the old answer is the first neighbor
    probable = np.where(has_old, (scored + 1 - old) / 2, scored)
    return np.where(counts > 0, probable, np.nan)


def in_reading_order(table: pd.DataFrame) -> Any:
    """The table with the columns that all runs share first."""
    others = [column for column in table.columns if column not in FIRST_COLUMNS]
    first = [column for column in FIRST_COLUMNS if column in table]
    return table[[*first, *others]]
