"""Racing: which windows to go on looking at, decided from scores alone. Rows out, scores in: no model, no pictures.

All windows start on a few (prompt, seed) pairs; those that can no longer be the best are dropped. Windows share
prompt and seed (common random numbers), and the baseline of the pair is subtracted (a control variate), so all
comparisons are paired. What is bounded is how much of another window's effect the leader reaches at least:

- one comparison, one look: the one-sided paired t bound of `leader - r * other`. *Assumptions*: over pairs, these
  differences are about normal; any variances, any correlation between windows; and pairs count as separate draws, which
  they are for the concept's own prompts where a seed does not move all its pairs' differences alike. So all that is
  said is of these prompts (another set may have another best window), and seeds take turns. Bounds that know only a
  range (empirical Bernstein, betting; Waudby-Smith & Ramdas, J. R. Stat. Soc. B 86, 2024) need none, and cannot drop
  anything before log2((windows - 1) * looks / alpha) pairs, ten or more: even a fair coin falls the same way so often.
  That is more pairs than a race should take.
- all looks: alpha is spent in equal parts on looks that are fixed beforehand (Bonferroni; the simplest of the alpha
  spending functions of Lan & DeMets, Biometrika 70, 1983), so peeking costs nothing further.
- all windows: the true best is one window, though unknown, so it has `windows - 1` rivals and not all pairs of windows
  (Hsu, Ann. Stat. 12, 1984). With probability 1 - alpha it is never dropped, and what is said of the winner holds.

tests/localization/test_racing.py simulates the error rate on noise resampled from the mini model, and that of a
plain bootstrap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from locogen.errors import LocogenError
from locogen.plan import Concept, Intervention, Pooled, distinct_seeds, sweep
from locogen.stats import split_seeds, student_quantile

ALPHA = 0.05
BUDGET = 0.35  # of the pictures of the exhaustive search
FIRST = 3  # pairs at the first look
Array = np.ndarray[Any, Any]
Rows = list[Intervention]
Raced = tuple[Rows, list[dict[str, Any]]]


def looks(pairs: int) -> tuple[int, ...]:
    """After how many pairs a race of so many looks: 3, then a third more each time (4, 6, 8, 11, ...), then all."""
    found = [min(FIRST, pairs)]
    while found[-1] < pairs:
        found.append(min(pairs, math.ceil(found[-1] * 4 / 3)))
    return tuple(found)


@functools.cache
def _critical(tail: float, freedom: int) -> float:
    return float(student_quantile(tail, freedom))


def bound(values: Array, tail: float) -> float:
    """Lower bound of the mean of (pairs,) `values`, by Student's t; wrong with probability `tail`. -inf under three.

    Two pairs can agree by chance, and what that is worth is up to the distribution's center and not its tails.
    """
    n = len(values)
    if n < FIRST:
        return -math.inf
    return float(values.mean() - _critical(tail, n - 1) * values.std(ddof=1) / math.sqrt(n))


def ahead(leader: Array, other: Array, tail: float) -> bool:
    """Whether the leader has an effect, and a larger one than the other, which therefore is not the best."""
    return bound(leader, tail) > 0 and bound(leader - other, tail) > 0


def reach(leader: Array, other: Array, tail: float) -> float:
    """The share r of the other's mean that the leader's reaches at least, 0 to 1; (pairs,) effects on the same pairs.

    The largest r for which the bound of `leader - r * other` is positive. The bound is concave in r, so it is positive
    from 0 up to there and nowhere beyond, and r is wrong only where the bound at the true share is: one event, with
    probability at most `tail`. 1 means that the other is not the best; 0 that nothing can be said.
    """
    if bound(leader, tail) <= 0:
        return 0.0
    if ahead(leader, other, tail):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if bound(leader - middle * other, tail) > 0 else (low, middle)
    return low


@dataclass
class Race:
    """The state of a race: `effects` (windows, pairs), NaN where not looked; `left` window → (how, after which pair).

    `left` says "dropped" (it cannot be the best, at `alpha` for the whole race) or "cut" (for the budget's sake).
    """

    windows: int
    pairs: int
    alpha: float = ALPHA
    effects: Array = field(init=False)
    left: dict[int, tuple[str, int]] = field(init=False, default_factory=dict)
    seen: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.effects = np.full((self.windows, self.pairs), np.nan)

    @property
    def tail(self) -> float:
        """Error probability of one comparison at one look."""
        return self.alpha / max(1, self.windows - 1) / len(looks(self.pairs))

    @property
    def alive(self) -> list[int]:
        """Windows still in the race, best first."""
        means = self.effects[:, : self.seen].sum(1)
        return sorted((w for w in range(self.windows) if w not in self.left), key=lambda w: -means[w])

    @property
    def sure(self) -> float:
        """With probability 1 - alpha the leader reaches at least this share of any other window's effect."""
        leader = self.effects[self.alive[0]]
        stayed = [(w, self.seen) for w in self.alive[1:]]
        cut = [(w, after) for w, (how, after) in self.left.items() if how == "cut"]
        return min((reach(leader[:n], self.effects[w, :n], self.tail) for w, n in stayed + cut), default=1.0)

    def look(self, effects: Array) -> None:
        """Take the effects of the windows in `alive`, in order of number, on further pairs; drop who cannot win."""
        upto = self.seen + effects.shape[1]
        self.effects[sorted(self.alive), self.seen : upto] = effects
        self.seen = upto
        leader, *others = self.alive
        lead = self.effects[leader, :upto]
        for w in others:
            if ahead(lead, self.effects[w, :upto], self.tail):
                self.left[w] = ("dropped", upto)

    def keep(self, best: int) -> None:
        """Cut all but so many of those ahead."""
        for w in self.alive[best:]:
            self.left[w] = ("cut", self.seen)


def race(
    concept: Concept,
    *,
    n_layers: int,
    window: int,
    seeds: Iterable[int],
    controls: bool = True,
    pooled: Pooled = "keep",
    budget: float = BUDGET,
    alpha: float = ALPHA,
) -> Generator[Rows, Array, Raced]:
    """The race of one concept: yields rows to make, is sent their scores, returns the rows and what is said of each.

    Windows race on the seeds that serve to choose (`stats.split_seeds`), at most so that all rows together are the
    share `budget` of `plan.sweep`'s. The winner, and the best window that does not overlap it, are then made for all
    pairs, and with `controls` the ceiling, the placebo and the winner's insert. Rows come in the sweep's order. Of a
    window's rows is said: `verdict` (chosen, stayed, dropped, cut), `looked` (pairs it raced on), `sure` (`Race.sure`).
    Raises `LocogenError` for under four seeds and for a budget that is too small.
    """
    every = sweep(concept, n_layers=n_layers, window=window, seeds=seeds, controls=controls, pooled=pooled)
    cells = {(row.prompt, row.seed, row.role, row.start): row for row in every}
    choosing, rest = _ordered_pairs(concept, sorted(distinct_seeds(seeds)))
    pairs = choosing + rest
    state = Race(n_layers - window + 1, len(choosing), alpha)
    common = ("baseline", "ceiling", "placebo") if controls else ("baseline",)
    always = len(pairs) * (len(common) + controls)  # rows of every pair, with the winner's insert
    allowed = _allowed(budget, len(every), always, state, len(pairs))
    while state.seen < state.pairs:
        upto = _next(state, allowed, len(pairs))
        alive = sorted(state.alive)
        if len(alive) == 1 and state.windows > 1:
            break
        now = choosing[state.seen : upto]
        rows = [cells[*pair, "baseline", None] for pair in now]
        rows += [cells[*pair, "window", w] for w in alive for pair in now]
        scores = (yield rows).reshape(len(alive) + 1, len(now))
        state.look(concept.sign * (scores[1:] - scores[0]))
    made = _made(state, cells, pairs, common, window)
    sure, rows = state.sure, [row for row in every if row in made]
    return rows, [_said(state, row, sure) for row in rows]


def _ordered_pairs(concept: Concept, seeds: Sequence[int]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(prompt, seed) of the seeds that choose, and of the others; seeds in turn, each with its prompts shuffled.

    So any few pairs are a fair draw, of different seeds and different prompts as far as may be.
    """
    if len(seeds) < 4:
        raise LocogenError(f"a race needs seeds to choose and others to judge: give at least four, not {len(seeds)}")
    parts: list[list[tuple[str, int]]] = []
    for part in split_seeds(seeds):
        order = [np.random.default_rng([abs(seed), 1]).permutation(len(concept.pairs)) for seed in part]
        turns = zip(*order, strict=True)  # one prompt for each seed
        parts.append([(concept.pairs[i].prompt, seed) for turn in turns for seed, i in zip(part, turn, strict=True)])
    return parts[0], parts[1]


def _window_rows(state: Race, alive: int, upto: int, pairs: int) -> int:
    """Window rows in all if so many windows go on to pair `upto` and the race ends there, with its two finalists."""
    early = min([upto, *(after for _, after in state.left.values())])  # the rival may be one that left
    left = (pairs - upto) + (pairs - early) * (state.windows > 1)
    return int(np.isfinite(state.effects).sum()) + alive * (upto - state.seen) + left


def _allowed(budget: float, exhaustive: int, common: int, state: Race, pairs: int) -> int:
    """How many window rows the budget allows; raises where they do not suffice for a first look."""
    least = common + _window_rows(state, state.windows, min(2, state.pairs), pairs)
    allowed = int(budget * exhaustive + 1e-9)
    if not 0 < budget <= 1 or allowed < least:
        needed = math.ceil(100 * least / exhaustive) / 100
        raise LocogenError(
            f"the budget is {budget}, this race takes {needed} of the pictures at least: give more, or more seeds"
        )
    return allowed - common


def _next(state: Race, allowed: int, pairs: int) -> int:
    """How many pairs to have seen at the next look; cuts windows where not all can be afforded."""
    upto = next(n for n in looks(state.pairs) if n > state.seen)
    if not state.seen:
        while _window_rows(state, state.windows, upto, pairs) > allowed:
            upto -= 1
    elif _window_rows(state, len(state.alive), upto, pairs) > allowed:
        spare = allowed - _window_rows(state, 0, upto, pairs) - (upto - state.seen)  # the rival may stop here
        state.keep(max(1, spare // (upto - state.seen)))
    return upto


def _made(
    state: Race, cells: dict[Any, Intervention], pairs: Sequence[Any], common: Sequence[str], width: int
) -> set[Any]:
    """All rows of the race: those looked at, and the winner, its rival and the controls on every pair."""
    winner = state.alive[0]
    means = np.nanmean(state.effects, axis=1)
    rivals = [w for w in range(state.windows) if abs(w - winner) >= width]
    finalists = [winner, *sorted(rivals, key=lambda w: -means[w])[:1]]
    made = {cells[*pair, role, None] for pair in pairs for role in common}
    made |= {cells[*pair, "window", w] for pair in pairs for w in finalists}
    made |= {cells[*pairs[p], "window", w] for w, p in np.argwhere(np.isfinite(state.effects)).tolist()}
    return made | ({cells[*pair, "insert", winner] for pair in pairs} if "ceiling" in common else set())


def _said(state: Race, row: Intervention, sure: float) -> dict[str, Any]:
    if row.start is None:
        return {"verdict": None, "looked": None, "sure": None}
    stayed = ("chosen" if row.start == state.alive[0] else "stayed", state.seen)
    verdict, looked = state.left.get(row.start, stayed)
    return {"verdict": verdict, "looked": looked, "sure": sure}


def run_races(
    races: Sequence[Generator[Rows, Array, Raced]], measure: Callable[[dict[int, Rows]], dict[int, Array]]
) -> list[Raced]:
    """Run races side by side, so that their rows share batches. `measure`: rows of race number i → their scores."""
    done: dict[int, Raced] = {}
    asked = {i: next(runner) for i, runner in enumerate(races)}
    while asked:
        for i, scores in measure(asked).items():
            try:
                asked[i] = races[i].send(scores)
            except StopIteration as stop:
                done[i] = stop.value
                del asked[i]
    return [done[i] for i in range(len(races))]
