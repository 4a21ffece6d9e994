"""Racing: which windows to go on looking at, decided from scores alone.

Rows come out and scores go in: no model, no pictures here.

All windows start on a few (prompt, seed) pairs; those that can no longer be the best are dropped.
Windows share prompt and seed (common random numbers), and the baseline of the pair is subtracted (a
control variate), so all comparisons are paired. What is bounded is how much of another window's
effect the leader reaches at least:

- One comparison, one look: the one-sided paired t bound of `leader - r * other`. *Assumption*:
  these differences are about normal; any variances, any correlation between windows.
- The unit is the seed: a seed may move the differences of all its prompts alike, and then pictures
  of one seed are hardly more than one draw. So the pairs of a seed count together, Student's t has
  as many degrees of freedom as there are seeds less one, and every seed takes part (seeds take
  turns, and the first pairs are of different seeds). Many seeds with few prompts decide sooner than
  few seeds with many prompts. The result speaks for these prompts; others may have another best
  window.
- Bounds that know only a range (empirical Bernstein, betting; Waudby-Smith & Ramdas, J. R. Stat.
  Soc. B 86, 2024) need no assumption, and cannot drop anything before log2((windows - 1) * looks /
  alpha) units, ten or more: even a fair coin falls the same way that often. That is more than a
  race should take.
- All looks: alpha is spent in equal parts on looks that are fixed beforehand (Bonferroni; the
  simplest of the alpha spending functions of Lan & DeMets, Biometrika 70, 1983), so repeated looks
  cost nothing further.
- All windows: the true best is one window, though unknown, so it has `windows - 1` rivals and not
  all pairs of windows (Hsu, Ann. Stat. 12, 1984). With probability 1 - alpha it is never dropped,
  and what is said about the winner holds.

Which windows start first makes no difference while the budget pays for a first look at all of them,
as the default does for any number of layers: each comparison takes three pairs of its own, in any
order. A smaller budget needs a ranking (`order`, from `attribution`): the best of it start, and the
others are not looked at, of which the result says that nothing is sure.

Every seed serves for the choice, so none is left to judge the winner by: what is said of it
afterwards must be corrected for the choice among all windows (`effects.partial_effects`).

tests/localization/test_racing.py simulates the error rate on noise resampled from the mini model
and with seeds that move all prompts alike, and that of a plain bootstrap and of pairs that count as
separate draws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from locogen.errors import LocogenError
from locogen.localization.attribution.search import with_rival
from locogen.plan import Concept, Intervention, Pooled, distinct_seeds, sweep
from locogen.stats import ALPHA, student_quantile

BUDGET = 0.35  # of the pictures of the exhaustive search
FIRST_LOOK = 3  # pairs
Array = np.ndarray[Any, Any]
Pair = tuple[str, int]  # (prompt, seed)
Rows = list[Intervention]
Cells = dict[tuple[str, int, str, int | None], Intervention]  # (prompt, seed, role, start) → row
Raced = tuple[Rows, list[dict[str, Any]]]  # the rows, and the verdict on each
Result = TypeVar("Result")  # of a search


def looks(pairs: int) -> tuple[int, ...]:
    """Numbers of pairs at which a race decides: 3, a third more each time, then all."""
    numbers = [min(FIRST_LOOK, pairs)]
    while numbers[-1] < pairs:
        third_more = math.ceil(numbers[-1] * 4 / 3)
        numbers.append(min(pairs, third_more))
    return tuple(numbers)


@functools.cache
def _critical(tail: float, freedom: int) -> float:
    return student_quantile(tail, freedom)


def bound(values: Array, tail: float, seeds: Sequence[int] | None = None) -> float:
    """Lower bound of the mean of (pairs,) `values`, by Student's t; wrong with probability `tail`.

    `seeds`: the seed of each pair; pairs of one seed may be moved alike, so they count together.
    None: every pair has a seed of its own.

    -inf for fewer than three seeds: two can agree by chance, and what that is worth depends on the
    center of the distribution and not on its tails.
    """
    count = len(values)
    totals = values - values.mean()  # (pairs,)
    if seeds is not None:
        totals = _by_seed(totals, seeds)  # (seeds,)
    units = len(totals)
    if units < FIRST_LOOK:
        return -math.inf
    variance = units / (units - 1) * float(np.square(totals).sum())
    standard_error = math.sqrt(variance) / count
    return float(values.mean() - _critical(tail, units - 1) * standard_error)


def _by_seed(values: Array, seeds: Sequence[int]) -> Array:
    """Sums of the values of each seed, (pairs,) -> (seeds,)."""
    _, number = np.unique(seeds, return_inverse=True)  # (pairs,)
    return np.bincount(number, weights=values)


def ahead(leader: Array, other: Array, tail: float, seeds: Sequence[int] | None = None) -> bool:
    """Whether the leader has an effect, and a larger one: then the other is not the best."""
    return bound(leader, tail, seeds) > 0 and bound(leader - other, tail, seeds) > 0


def reach(leader: Array, other: Array, tail: float, seeds: Sequence[int] | None = None) -> float:
    """The share r of the other's mean that the leader's reaches at least, 0 to 1.

    `leader`, `other`: effects on the same pairs, (pairs,); `seeds`: as in `bound`. 1 means that the
    other is not the best; 0 that nothing can be said.
    """
    if not len(leader) or bound(leader, tail, seeds) <= 0:
        return 0.0
    if ahead(leader, other, tail, seeds):
        return 1.0
    # The largest r for which the bound of `leader - r * other` is positive, by bisection. The bound
    # is concave in r, so it is positive from 0 up to there and nowhere beyond, and r is wrong only
    # where the bound at the true share is: one event, with probability at most `tail`.
    low = 0.0
    high = 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if bound(leader - middle * other, tail, seeds) > 0:
            low = middle
        else:
            high = middle
    return low


@dataclass
class Race:
    """The state of a race.

    `effects`: (windows, pairs), NaN where not looked. `left`: window → (how, after how many pairs),
    where how is "dropped" (it cannot be the best, at `alpha` for the whole race) or "cut" (for the
    budget; after no pair: it did not start). `seeds`: the seed of each pair, None: each has its
    own.
    """

    windows: int
    pairs: int
    alpha: float = ALPHA
    seeds: Sequence[int] | None = None
    effects: Array = field(init=False)
    left: dict[int, tuple[str, int]] = field(init=False, default_factory=dict)
    seen: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.effects = np.full((self.windows, self.pairs), np.nan)

    @property
    def tail(self) -> float:
        """Error probability of one comparison at one look."""
        return self.alpha / max(1, self.windows - 1) / len(looks(self.pairs))

    def seeds_upto(self, count: int) -> Sequence[int] | None:
        """The seeds of the first `count` pairs."""
        return None if self.seeds is None else self.seeds[:count]

    @property
    def alive(self) -> list[int]:
        """Windows still in the race, best first."""
        totals = self.effects[:, : self.seen].sum(1)  # (windows,)
        staying = [window for window in range(self.windows) if window not in self.left]
        return sorted(staying, key=lambda window: -totals[window])

    @property
    def sure(self) -> float:
        """Share of any other window's effect that the leader reaches, at confidence 1 - alpha."""
        winner, *others = self.alive
        leader = self.effects[winner]  # (pairs,)
        # Rival → on how many pairs it was looked at. Dropped windows are none: the test that
        # dropped them has shown that the leader is ahead.
        looked = dict.fromkeys(others, self.seen)
        for window, (how, after) in self.left.items():
            if how == "cut":
                looked[window] = after
        reached = []
        for window, count in looked.items():
            rival = self.effects[window, :count]
            reached.append(reach(leader[:count], rival, self.tail, self.seeds_upto(count)))
        return min(reached, default=1.0)

    def look(self, effects: Array) -> None:
        """Take effects on further pairs, and drop the windows that cannot win.

        `effects`: (windows alive, further pairs), windows in order of number.
        """
        upto = self.seen + effects.shape[1]
        self.effects[sorted(self.alive), self.seen : upto] = effects
        self.seen = upto
        winner, *others = self.alive
        leader = self.effects[winner, :upto]
        seeds = self.seeds_upto(upto)
        for window in others:
            if ahead(leader, self.effects[window, :upto], self.tail, seeds):
                self.left[window] = ("dropped", upto)

    def start(self, windows: Iterable[int]) -> None:
        """Look at these windows alone."""
        for window in set(range(self.windows)) - set(windows):
            self.left[window] = ("cut", 0)

    def keep(self, best: int) -> None:
        """Cut all windows but the `best` first ones."""
        for window in self.alive[best:]:
            self.left[window] = ("cut", self.seen)

    def verdict(self, window: int) -> tuple[str, int]:
        """How a window left the race, or stayed in it, and after how many pairs."""
        if window in self.left:
            return self.left[window]
        how = "chosen" if window == self.alive[0] else "stayed"
        return how, self.seen


def race(
    concept: Concept,
    *,
    n_layers: int,
    window: int,
    seeds: Iterable[int],
    controls: bool = True,
    pooled: Pooled = "keep",
    budget: float = BUDGET,
    order: Callable[[], Sequence[int]] | None = None,
    alpha: float = ALPHA,
) -> Generator[Rows, Array, Raced]:
    """The race of one concept, as a generator: yields rows to make, is sent their scores.

    Windows race on the pairs of all seeds, as many as it takes. The winner, and the best window
    that does not overlap it, are then made for all pairs, and with `controls` the ceiling, the
    placebo and the winner's insert.

    Args:
        concept: What to look for.
        n_layers: Number of cross-attention layers.
        window: Layers in a window.
        seeds: At least four; they are the unit (see the head of this module), so few of them can
            drop only windows that are far behind.
        controls: Whether to make the controls.
        pooled: As in `plan.Intervention`.
        budget: Share of the rows of `plan.sweep` that all rows of the race may reach.
        order: Gives the windows by their first layers, the most promising first. Asked only where
            the budget does not pay for a look at all: as many start as it pays for. None: then it
            is refused.
        alpha: Error probability of the whole race.

    Returns:
        All rows, in the order of the sweep, and a verdict on each: `verdict` (chosen, stayed,
        dropped, cut), `looked` (pairs it raced on), `sure` (`Race.sure`), `windows` (how many there
        are, looked at or not).

    Raises:
        LocogenError: For fewer than four seeds, or a budget that is too small.
    """
    every = sweep(
        concept, n_layers=n_layers, window=window, seeds=seeds, controls=controls, pooled=pooled
    )
    pairs = ordered_pairs(concept, sorted(distinct_seeds(seeds)))
    cells = _cells(every)
    seed_of_pair = tuple(seed for _, seed in pairs)
    state = Race(n_layers - window + 1, len(pairs), alpha, seed_of_pair)
    # What every pair gets, whichever window wins.
    always = ["baseline", "ceiling", "placebo"] if controls else ["baseline"]
    funds = _Funds(budget, len(every), _rows_a_pair(controls) * len(pairs))
    state.start(_starting(state, funds, order, window))
    allowed = funds.for_windows

    while state.seen < state.pairs:
        upto = _next_look(state, allowed)
        alive = sorted(state.alive)
        if len(alive) == 1 and state.windows > 1:
            break  # the winner is known
        pairs_now = pairs[state.seen : upto]
        scores = yield _rows_of_look(cells, pairs_now, alive)
        scores = scores.reshape(len(alive) + 1, len(pairs_now))  # (baseline and windows, pairs)
        state.look(concept.sign * (scores[1:] - scores[0]))

    needed = _rows_of_race(state, cells, pairs, always, window)
    rows = [row for row in every if row in needed]
    sure = state.sure
    return rows, [_verdict(state, row, sure) for row in rows]


def _cells(rows: Iterable[Intervention]) -> Cells:
    """The rows of a sweep by what they are for."""
    return {(row.prompt, row.seed, row.role, row.start): row for row in rows}


def _rows_of_look(cells: Cells, pairs: Sequence[Pair], windows: Sequence[int]) -> Rows:
    """The baseline on every pair, then each window on every pair."""
    rows = [cells[*pair, "baseline", None] for pair in pairs]
    for start in windows:
        rows += [cells[*pair, "window", start] for pair in pairs]
    return rows


def ordered_pairs(concept: Concept, seeds: Sequence[int]) -> list[Pair]:
    """Every pair of a prompt and a seed, in the order in which a race takes them.

    In rounds: each seed with one prompt, and no two seeds of a round with the same prompt while
    there are prompts left. So any few pairs are of different seeds and prompts as far as possible.
    """
    if len(seeds) < 4:
        raise LocogenError(
            "a race needs several seeds, by which it tells luck from effect: "
            f"give at least four, not {len(seeds)}"
        )
    count = len(concept.pairs)
    shuffled = np.random.default_rng([abs(seeds[0]), 1]).permutation(count)
    pairs = []
    for turn in range(count):
        for place, seed in enumerate(seeds):
            prompt = concept.pairs[shuffled[(turn + place) % count]].prompt
            pairs.append((prompt, seed))
    return pairs


@dataclass(frozen=True)
class _Funds:
    """What a race may spend: `exhaustive` rows has the whole search, `common` every race."""

    budget: float
    exhaustive: int
    common: int

    @property
    def for_windows(self) -> int:
        """Rows that are left for windows."""
        return int(self.budget * self.exhaustive + 1e-9) - self.common

    def check(self, rows: int) -> None:
        """Raise `LocogenError` if so many rows of windows are more than there is."""
        if 0 < self.budget <= 1 and rows <= self.for_windows:
            return
        needed = math.ceil(100 * (self.common + rows) / self.exhaustive) / 100
        raise LocogenError(
            f"the budget is {self.budget}, this race takes {needed} of the pictures at least: "
            "give more, or more seeds"
        )


def _rows_a_pair(controls: bool) -> int:
    """Rows that every pair gets: the baseline; ceiling, placebo and the winner's insert."""
    return 4 if controls else 1


def _least(state: Race, windows: int) -> int:
    """Window rows of a race that looks at so many windows on two pairs, and no more."""
    return _window_rows(state, windows, min(2, state.pairs))


def _starting(
    state: Race, funds: _Funds, order: Callable[[], Sequence[int]] | None, width: int
) -> Sequence[int]:
    """The windows that the race begins with: all, or the first of the order and their rival."""
    everything = range(state.windows)
    if order is None or _least(state, state.windows) <= funds.for_windows:
        funds.check(_least(state, state.windows))
        return everything
    funds.check(_least(state, min(2, state.windows)))
    count = 2
    first_look = min(FIRST_LOOK, state.pairs)
    while _window_rows(state, count + 1, first_look) <= funds.for_windows:
        count += 1
    return with_rival(order(), count - 1, width)


def _window_rows(state: Race, alive: int, upto: int) -> int:
    """Window rows in all, if `alive` windows go on to pair `upto` and the race ends there.

    Its two finalists are then made for all pairs; the rival may be one that left early.
    """
    already = int(np.isfinite(state.effects).sum())
    of_winner = state.pairs - upto
    earliest = min([upto, *(after for _, after in state.left.values() if after)])
    of_rival = state.pairs - earliest if state.windows > 1 else 0
    return already + alive * (upto - state.seen) + of_winner + of_rival


def _next_look(state: Race, allowed: int) -> int:
    """How many pairs to have seen at the next look; cuts windows if not all can be afforded."""
    upto = next(count for count in looks(state.pairs) if count > state.seen)
    if not state.seen:
        while _window_rows(state, len(state.alive), upto) > allowed:
            upto -= 1
        return upto
    if _window_rows(state, len(state.alive), upto) > allowed:
        further = upto - state.seen
        spare = allowed - _window_rows(state, 0, upto) - further  # the rival may stop here
        state.keep(max(1, spare // further))
    return upto


def _rows_of_race(
    state: Race, cells: Cells, pairs: Sequence[Pair], always: Sequence[str], width: int
) -> set[Intervention]:
    """All rows of the race: those looked at; finalists and controls on every pair."""
    winner = state.alive[0]
    rows = set()
    for pair in pairs:
        rows |= {cells[*pair, role, None] for role in always}
        rows |= {cells[*pair, "window", start] for start in _finalists(state, width)}
        if "ceiling" in always:
            rows.add(cells[*pair, "insert", winner])
    looked_at = np.argwhere(np.isfinite(state.effects)).tolist()  # [[window, pair], ...]
    rows |= {cells[*pairs[pair], "window", start] for start, pair in looked_at}
    return rows


def _finalists(state: Race, width: int) -> list[int]:
    """The winner, and the best window that does not overlap it, if there is one."""
    winner = state.alive[0]
    seen = [start for start in range(state.windows) if np.isfinite(state.effects[start]).any()]
    apart = [start for start in seen if abs(start - winner) >= width]
    if not apart:
        return [winner]
    # On the pairs that each was looked at.
    return [winner, max(apart, key=lambda start: float(np.nanmean(state.effects[start])))]


def _verdict(state: Race, row: Intervention, sure: float) -> dict[str, Any]:
    """The columns that a race adds to a row; empty for baseline and controls."""
    if row.start is None:
        return {"verdict": None, "looked": None, "sure": None, "windows": None}
    verdict, looked = state.verdict(row.start)
    return {"verdict": verdict, "looked": looked, "sure": sure, "windows": state.windows}


def run_races(
    races: Sequence[Generator[Rows, Array, Result]],
    measure: Callable[[dict[int, Rows]], dict[int, Array]],
) -> list[Result]:
    """Run races, or other searches that ask for rows, side by side: their rows share batches.

    `measure`: {number of a race: its rows} → {number: their scores}.
    """
    results: dict[int, Result] = {}
    requests = {number: next(runner) for number, runner in enumerate(races)}
    while requests:
        for number, scores in measure(requests).items():
            try:
                requests[number] = races[number].send(scores)
            except StopIteration as stop:
                results[number] = stop.value
                del requests[number]
    return [results[number] for number in range(len(races))]
