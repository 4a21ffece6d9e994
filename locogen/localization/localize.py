"""LocoGen: generate every window of layers and score it: `localize(pipe, concept) -> Run`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from locogen.catalog import usual_settings
from locogen.errors import LocogenError
from locogen.localization.raced import raced_run
from locogen.localization.racing import BUDGET, Rows, race
from locogen.models.families import check_known
from locogen.models.layers import find_layers
from locogen.models.offload import resting_device
from locogen.pictures.fingerprint import same_weights
from locogen.pictures.runs import Run, generate
from locogen.plan import Concept, Pooled, distinct_seeds, sweep

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.score import Scorer

Array = np.ndarray[Any, Any]
Make = Callable[..., Run]


def localize(
    pipe: Any,
    concept: Concept | Sequence[Concept],
    *,
    window: int | None = 2,
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
    """LocoGen (Basu et al. 2024, section 4) over every window, with the rows that give a number its meaning.

    For each prompt pair and seed: the baseline, each window hearing the target, and with `controls`
    the ceiling, the placebo and the insert sweep (see `plan.sweep`). Every picture is scored
    against the concept's text, and against what should stay (`content_score`; NaN for facts).
    `timesteps`, `pooled`: see `plan.sweep`; in families that hear text by a pooled vector too,
    "keep" asks for the layers alone, and the ceiling is less than the target's own run. `scorer`: a
    scorer or its name. None for `window`, `num_inference_steps`, `guidance_scale` or `scorer` takes
    the catalog's for the model. `store`: a folder; what it holds is not made again. `search`: "all"
    windows on every prompt and seed, or a "race" (`racing.race`), which drops windows that cannot
    be the best and makes at most the share `budget` of those pictures; its table says of each
    window `verdict`, `looked` and `sure`. Returns a `Run` whose table is the pictures table. Raises
    `LocogenError` for a concept that the tokenizer does not know, a window larger than the model,
    no or repeated seeds, a race on too few or over timesteps, and as `generate` does.
    """
    concepts = _concepts(concept)
    for one in concepts:
        check_known(pipe, one)
    if search not in ("all", "race"):
        raise LocogenError(f"search is {search!r}: take 'all' or 'race'")
    usual = usual_settings(_source(pipe))
    count, width = len(find_layers(pipe)), usual["window"] if window is None else window
    asked: dict[str, Any] = dict(n_layers=count, window=width, seeds=distinct_seeds(seeds), controls=controls)
    asked, spans = {**asked, "pooled": pooled}, tuple(timesteps)
    if spans and search == "race":
        raise LocogenError("a race looks at no timesteps: take search='all' for them")
    judge = _scorer(scorer, pipe)  # before the pictures: what is wrong with it should not cost a sweep
    make: Make = functools.partial(
        generate,
        pipe,
        num_inference_steps=usual["num_inference_steps"] if num_inference_steps is None else num_inference_steps,
        guidance_scale=usual["guidance_scale"] if guidance_scale is None else guidance_scale,
        batch_size=batch_size,
        progress=progress,
    )
    measured = functools.partial(_measured, concepts, judge, make)
    told = {"window": width, "n_layers": count, "search": search}
    if search == "all":
        plans = [list(sweep(c, timesteps=spans, **asked)) for c in concepts]
        run = measured(range(len(concepts)), plans, store)
        return run.with_table(run.table, **told)
    with same_weights():
        run = raced_run([race(c, budget=budget, **asked) for c in concepts], measured, store)
    return run.with_table(run.table, budget=budget, **told)


def _measured(
    concepts: Sequence[Concept], judge: Scorer, make: Make, who: Sequence[int], plans: Sequence[Rows], store: Any
) -> Run:
    """The pictures of one plan for each of the concepts with the numbers `who`, scored."""
    run = make([row for plan in plans for row in plan], store=store)
    table = run.table.assign(**_scored_against([concepts[i] for i in who], plans))
    return run.with_table(_ordered(table.assign(**_scores(run, table, judge))), **judge.settings)


def _concepts(given: Any) -> list[Concept]:
    concepts: list[Any] = [given] if isinstance(given, (Concept, str)) else list(given)
    strangers = [c for c in concepts if not isinstance(c, Concept)]
    if strangers:
        raise LocogenError(f"{strangers[0]!r} is no Concept: take loco.concept({strangers[0]!r}), or make one")
    names = [c.name for c in concepts]
    if not concepts or len(set(names)) < len(names):
        raise LocogenError(f"localize was given the concepts {names}: give at least one, and no name twice")
    return concepts


def _scorer(chosen: Scorer | str | None, pipe: Any) -> Scorer:
    from locogen.pictures.score import default_scorer, scorer

    if chosen is None:
        chosen = default_scorer(_source(pipe))
    return scorer(chosen, device=resting_device(pipe)) if isinstance(chosen, str) else chosen


def _source(pipe: Any) -> str:
    """The folder or hub id that the model was loaded from; empty for one that was made in place."""
    return str(getattr(pipe.config, "_name_or_path", "") or "")


def _scored_against(concepts: Sequence[Concept], plans: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in ("concept", "kind", "pair", "text", "content")}
    for concept, plan in zip(concepts, plans, strict=True):
        pairs = {pair.prompt: (i, pair) for i, pair in enumerate(concept.pairs)}
        for row in plan:
            index, pair = pairs[row.prompt]
            values = (concept.name, concept.kind, index, concept.scored_text(pair), concept.content_text(pair))
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    return columns


def _scores(run: Run, table: pd.DataFrame, judge: Scorer, part: int = 256) -> dict[str, Array]:
    """Score in parts, so that not all pictures are held at once."""
    silent = table["content"].isna().to_numpy()
    texts, contents = list(table["text"]), list(table["content"].fillna(""))
    halves: list[list[Array]] = []
    for start in range(0, len(run), part):
        rows = slice(start, start + part)
        halves.append(judge(run.pictures[rows], texts[rows], contents[rows]))
    score, content = (np.concatenate(half) for half in zip(*halves, strict=True))
    return {"clip_score": score, "content_score": np.where(silent, np.nan, content)}


def _ordered(table: Any) -> Any:
    first = ["concept", "kind", "role", "prompt", "target", "text", "start", "width", "seed", "edit", "image"]
    first += ["clip_score", "content_score"]
    return table[[*first, *(c for c in table.columns if c not in first)]]
