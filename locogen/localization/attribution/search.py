"""Search by a proposal: which windows are measured, decided from a ranking and from scores.

Rows come out and scores go in, as in `racing`: no model, no pictures here.

1. *Choice*. The best windows of the ranking, and the best one that overlaps none of them, are
   measured on a few pairs of prompt and seed: with other seeds than those that were asked for. The
   one with the largest effect is chosen, and the best that does not overlap it is its rival.
2. *Judgment*. Both are made for every pair that was asked for, with the baseline and the controls.
   These seeds have chosen nothing, so no correction is needed for the choice.
3. *What may have been missed*. Of the windows that overlap the chosen one nowhere, and are not its
   rival, pictures are drawn at random: each window at most once, on a pair drawn for it; as many
   pictures as there are such windows, and no more than pairs. A picture *hits* where its effect is
   at least half of the chosen window's on the same pair. From the number of hits among so many
   follows the upper bound of Clopper and Pearson: with confidence 95 %, no larger share of all
   pictures of these windows would hit.

   *Why it holds*. Let q be the share of hits among all pictures of these windows, and q_w that of
   one window. A draw of n windows without replacement misses all with a probability that is the
   mean of the products of n of the 1 - q_w, which is at most (1 - q)^n (Maclaurin's inequality). So
   the binomial bound is safe, and it assumes nothing about scores. It speaks of pictures with these
   prompts and seeds, and is coarse: no hit in 11 pictures says "at most 24 %". The more windows and
   pairs there are, the lower it is. tests/localization/test_search.py simulates it.
4. *Challenge*. The sampled window that is furthest ahead of the chosen one, among those that hit,
   is made for every pair too. Since the same pictures then choose and judge, p-values are corrected
   for all windows.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from locogen.plan import Concept, Intervention, Pooled, distinct_seeds, sweep
from locogen.stats import ALPHA, clopper_pearson

BEST = 3  # windows of the ranking that are measured
PAIRS_A_SCOUT = 12  # so many pairs to judge by allow one that chooses
MOST_SCOUTS = 2
HIT = 0.5  # of the chosen window's effect on the same pair
Array = np.ndarray[Any, Any]
Pair = tuple[str, int]  # (prompt, seed)
Cell = tuple[int, Pair]  # a window by its first layer, and a pair
Rows = list[Intervention]


class Planned(NamedTuple):
    """The rows that one search of one concept ends with.

    Attributes:
        rows: In the order of the sweep.
        verdicts: Further columns of the pictures table, one mapping a row; none in a whole sweep.
        others: Rows that were made to choose by, and are not among `rows`.
    """

    rows: Sequence[Intervention]
    verdicts: Sequence[Mapping[str, Any]] = ()
    others: Sequence[Intervention] = ()


class Scouts(NamedTuple):
    """The prompts and seeds that propose and choose, and judge nothing."""

    concept: Concept
    seeds: tuple[int, ...]


def scouts(concept: Concept, seeds: Iterable[int]) -> Scouts:
    """One pair of prompt and seed, or two where there are many to judge by.

    The seeds are the whole numbers after the largest that was asked for.

    >>> from locogen.plan import PromptPair
    >>> few = scouts(Concept("cat", "object", (PromptPair("a cat", "a dog"),)), range(4))
    >>> few.seeds
    (4,)
    """
    numbers = distinct_seeds(seeds)
    pairs = len(concept.pairs) * len(numbers)
    count = min(MOST_SCOUTS, math.ceil(pairs / PAIRS_A_SCOUT))
    following = max(numbers) + 1
    if len(concept.pairs) >= count:
        return Scouts(concept.first(count), (following,))
    return Scouts(concept, tuple(range(following, following + count)))


def with_rival(order: Sequence[int], best: int, width: int) -> tuple[int, ...]:
    """The best windows of a ranking, and the best one that overlaps none of them.

    >>> with_rival([12, 13, 11, 10, 0, 1], 3, 2)
    (12, 13, 11, 0)
    """
    leading = tuple(order[:best])
    rival = _apart(order, leading, width)
    return leading if rival is None else (*leading, rival)


def _apart(order: Iterable[int], places: Sequence[int], width: int) -> int | None:
    """The first window of a ranking that overlaps none of the places."""
    for start in order:
        if all(abs(start - place) >= width for place in places):
            return start
    return None


@dataclass(frozen=True)
class Sample:
    """Pictures drawn at random from those of windows that nothing proposed.

    Attributes:
        windows: The windows they are drawn from, by their first layers.
        cells: The pictures drawn.
        pairs: How many pairs of prompt and seed there are.
    """

    windows: tuple[int, ...]
    cells: tuple[Cell, ...]
    pairs: int

    def missed(self, hits: int) -> float:
        """Largest share of these windows' pictures that may hit, with confidence 95 %.

        NaN where there are none: what was not drawn from bounds nothing.

        >>> Sample((0, 1, 2), tuple((start, ("a cat", 0)) for start in (0, 1, 2)), 9).missed(0)
        0.6315968501359612
        """
        if not self.windows:
            return math.nan
        return _upper_bound(hits, len(self.cells))


@functools.cache
def _upper_bound(hits: int, count: int) -> float:
    # The upper end of the two-sided interval at 90 % is the one-sided bound at 95 %.
    _, high = clopper_pearson(hits, count, 1 - 2 * ALPHA)
    return high


def drawn_at_random(windows: Sequence[int], pairs: Sequence[Pair], seed: Sequence[int]) -> Sample:
    """Draw as many pictures as there are windows, and no more than pairs; see the module's head."""
    dice = np.random.default_rng(seed)
    count = min(len(windows), len(pairs))
    # With no more pictures than windows there is one round: each window at most once.
    starts = dice.permutation(len(windows))[:count]
    places = dice.integers(len(pairs), size=count)
    cells = [(windows[start], pairs[place]) for start, place in zip(starts, places, strict=True)]
    return Sample(tuple(windows), tuple(cells), len(pairs))


def search(
    concept: Concept,
    *,
    order: Sequence[int],
    n_layers: int,
    window: int,
    seeds: Iterable[int],
    controls: bool = True,
    pooled: Pooled = "keep",
    best: int = BEST,
) -> Generator[Rows, Array, Planned]:
    """The search of one concept, as a generator: yields rows to make, is sent their scores.

    Args:
        concept: What to look for.
        order: The first layers of all windows, the most promising first.
        n_layers: Number of cross-attention layers.
        window: Layers in a window.
        seeds: Those that judge.
        controls: Whether to make the ceiling, the placebo and the chosen window's insert.
        pooled: As in `plan.Intervention`.
        best: How many windows of the ranking are measured, besides their rival.

    Returns:
        The rows that judge, with `verdict` (chosen, rival, challenger, sampled), `looked` (on how
        many pairs), `windows` (that there are), and what the random sample says: `others` (windows
        that it was drawn from), `sampled`, `hits`, `missed` (the bound). Beside them the rows that
        chose.
    """
    judging = distinct_seeds(seeds)
    layout = {"n_layers": n_layers, "window": window, "pooled": pooled}
    candidates = with_rival(order, best, window)
    choosing = _rows_to_choose(scouts(concept, judging), candidates, layout)
    ranking = list(candidates)
    if choosing:
        scores = yield choosing
        effects = _mean_effects(choosing, scores, concept.sign)
        ranking.sort(key=lambda start: -effects[start])

    winner = ranking[0]
    rival = _apart([*ranking, *order], [winner], window)
    finalists = {winner: "chosen"} | ({} if rival is None else {rival: "rival"})
    every = sweep(concept, seeds=judging, controls=controls, **layout)
    pairs = list(dict.fromkeys((row.prompt, row.seed) for row in every))
    elsewhere = [s for s in sorted(order) if abs(s - winner) >= window and s != rival]
    # The name too, so that not all concepts are sampled alike.
    seed = [zlib.crc32(concept.name.encode()), len(order), window]
    sample = drawn_at_random(elsewhere, pairs, seed)
    rows = _rows_to_judge(every, finalists, winner, sample)
    scores = yield rows
    hits = _hits(rows, scores, sample, winner, concept.sign)
    if hits:
        finalists[max(hits, key=lambda cell: hits[cell])[0]] = "challenger"
        # Their pictures are made with the others of the run: nothing is decided by them here.
        rows = _rows_to_judge(every, finalists, winner, sample)
    facts: dict[str, Any] = {
        "windows": len(order),
        "others": len(elsewhere),
        "sampled": len(sample.cells),
        "hits": len(hits),
    }
    facts["missed"] = sample.missed(len(hits))
    return Planned(rows, _verdicts(rows, finalists, facts), choosing)


def _rows_to_choose(scout: Scouts, candidates: Sequence[int], layout: Mapping[str, Any]) -> Rows:
    """The baselines and the candidates; nothing where there is no choice."""
    if len(candidates) < 2:
        return []
    every = sweep(scout.concept, seeds=scout.seeds, controls=False, **layout)
    return [row for row in every if row.role == "baseline" or row.start in candidates]


def _mean_effects(rows: Rows, scores: Array, sign: int) -> dict[int, float]:
    """Mean effect of each window, by its first layer."""
    effects: dict[int, list[float]] = {}
    for (start, _), effect in _effects(rows, scores, sign).items():
        effects.setdefault(start, []).append(effect)
    return {start: float(np.mean(values)) for start, values in effects.items()}


def _effects(rows: Rows, scores: Array, sign: int) -> dict[Cell, float]:
    """Effect of each window on each pair, against the baseline of the pair."""
    baselines = {}
    windows = {}
    for row, score in zip(rows, scores.tolist(), strict=True):
        pair = (row.prompt, row.seed)
        if row.role == "baseline":
            baselines[pair] = score
        if row.role == "window" and row.start is not None:
            windows[row.start, pair] = score
    return {cell: sign * (score - baselines[cell[1]]) for cell, score in windows.items()}


def _rows_to_judge(
    every: Iterable[Intervention], finalists: Iterable[int], winner: int, sample: Sample
) -> Rows:
    """Baseline and controls, the finalists and the winner's insert on all pairs; the sample."""
    complete = {("window", start) for start in finalists}
    complete |= {("insert", winner), ("baseline", None), ("ceiling", None), ("placebo", None)}
    cells = set(sample.cells)
    rows = []
    for row in every:
        is_sampled = row.role == "window" and (row.start, (row.prompt, row.seed)) in cells
        if is_sampled or (row.role, row.start) in complete:
            rows.append(row)
    return rows


def _hits(rows: Rows, scores: Array, sample: Sample, winner: int, sign: int) -> dict[Cell, float]:
    """Sampled pictures with at least half of the winner's effect, and how far ahead they are."""
    effects = _effects(rows, scores, sign)
    hits = {}
    for cell in sample.cells:
        _, pair = cell
        of_winner = effects[winner, pair]
        if effects[cell] >= HIT * of_winner:
            hits[cell] = effects[cell] - of_winner
    return hits


def _verdicts(
    rows: Rows, finalists: Mapping[int, str], facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The columns that the search adds to each row; empty for baseline and controls."""
    looked: dict[int | None, int] = {}
    for row in rows:
        if row.role == "window":
            looked[row.start] = looked.get(row.start, 0) + 1
    nothing = dict.fromkeys(("verdict", "looked", *facts))
    lines = []
    for row in rows:
        if row.start is None:
            lines.append({"search": "attribute", **nothing})
            continue
        how = finalists.get(row.start, "sampled")
        lines.append({"search": "attribute", "verdict": how, "looked": looked[row.start], **facts})
    return lines
