"""How much of a concept the best layers of a ranking bring by themselves: curves, CPR and CMD.

After MIB (Mueller et al. 2025, arXiv 2504.13151), with layers in the place of edges: the top k
layers of a ranking get the prompt, all others the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.localization.scored_pictures import score_columns
from locogen.models.defaults import settings_for
from locogen.pictures.runs import generate
from locogen.pictures.score import scorer_for
from locogen.plan import Concept, Intervention
from locogen.types import Pipeline

if TYPE_CHECKING:
    from locogen.pictures.score import Scorer

Array = np.ndarray[Any, Any]
COUNTS = (1, 2, 4, 8)  # of layers; none is the ceiling, and all are the baseline
SEEDS = 2  # pictures of each prompt and count


def circuit_scores(
    pipe: Pipeline,
    concept: Concept,
    profile: Array,
    *,
    seeds: Sequence[int],
    guidance_scale: float | None,
    store: Any,
    progress: bool,
    batch_size: int = 32,
    scorer: Scorer | str | None = None,
) -> dict[int, float]:
    """The mean score of pictures in which only the best layers of a profile get the prompt.

    Args:
        pipe: The pipeline.
        concept: The concept.
        profile: A value for each layer, (layers,); of equal ones the first comes first.
        seeds: Of which the first `SEEDS` are used.
        guidance_scale: Classifier-free guidance; None: the catalog's value.
        store: Folder for the pictures.
        progress: Whether to show a progress bar.
        batch_size: Pictures at once.
        scorer: None: the catalog's for this model.

    Returns:
        Number of layers → mean score; 0 is the ceiling, all layers the baseline.
    """
    plan, counts = circuit_plan(concept, profile, seeds[:SEEDS])
    judge = scorer_for(pipe, scorer)
    settings = settings_for(
        pipe, num_inference_steps=None, guidance_scale=guidance_scale, batch_size=batch_size
    )
    run = generate(pipe, plan, store=store, progress=progress, **settings.as_dict())
    pairs = {pair.prompt: pair for pair in concept.pairs}
    texts = [concept.scored_text(pairs[row.prompt]) for row in plan]
    table = run.table.assign(text=texts, content=None)
    scores = score_columns(run, table, judge)["clip_score"]
    of_count = np.array(counts)
    return {count: float(scores[of_count == count].mean()) for count in sorted(set(counts))}


def circuit_plan(
    concept: Concept, profile: Array, seeds: Sequence[int]
) -> tuple[list[Intervention], list[int]]:
    """The rows of all counts of layers, and the count of each row."""
    order = np.argsort(-profile, kind="stable")
    n_layers = len(order)
    plan = []
    counts = []
    for count in (0, *(count for count in COUNTS if count < n_layers), n_layers):
        rest = tuple(sorted(int(layer) for layer in order[count:]))
        for pair in concept.pairs:
            for seed in seeds:
                role = "insert" if rest else "baseline"
                plan.append(Intervention(pair.prompt, pair.target, rest, seed, role))
                counts.append(count)
    return plan, counts


def faithfulness(scores: Mapping[int, float], smallest: float) -> dict[int, float]:
    """f(k) = (score(k) - ceiling) / (baseline - ceiling); empty where the two hardly differ.

    Args:
        scores: Number of layers → mean score, from `circuit_scores`.
        smallest: The difference of baseline and ceiling below which there is no such ratio.
    """
    ceiling = scores[0]
    whole = scores[max(scores)] - ceiling
    if abs(whole) < smallest:
        return {}
    return {count: (score - ceiling) / whole for count, score in scores.items()}


def circuit_performance(curve: Mapping[int, float]) -> float:
    """CPR: the area under f over the share of layers; about 1 where the right ones come first."""
    return _area(curve, lambda f: f)


def circuit_distance(curve: Mapping[int, float]) -> float:
    """CMD: the area between f and 1; 0 if the first layer alone does what all do."""
    return _area(curve, lambda f: np.abs(1 - f))


def _area(curve: Mapping[int, float], height: Any) -> float:
    if not curve:
        return float("nan")
    counts = np.array(sorted(curve), np.float64)
    values = height(np.array([curve[int(count)] for count in counts]))
    steps = np.diff(counts / counts[-1])
    return float((steps * (values[1:] + values[:-1]) / 2).sum())
