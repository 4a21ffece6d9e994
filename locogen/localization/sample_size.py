"""How many seeds a question takes: the sample size for an interval of a given half-width, from a first run."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.errors import LocogenError
from locogen.localization.effects import carrier, effect
from locogen.plan import sign_of
from locogen.stats import FEW_PROMPTS, student_quantile

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.runs import Run

DRAWS = 4000
MOST = 4096  # seeds
Array = np.ndarray[Any, Any]


def plan_seeds(run: Run, interval: float = 0.01, *, level: float = 0.95, assurance: float = 0.8) -> pd.DataFrame:
    """How many seeds make the effect of each concept's best window known to within ± `interval`, one row a concept.

    `interval`: half the width of the interval in `effect`'s `low` and `high`, in units of the score. `seeds` are enough
    with probability `assurance`, over the spread of the interval to come and over how little is known of it from the
    seeds there are (few of them ask for more; Kupper & Hafner, Am. Stat. 43, 1989). Under six prompts the interval
    speaks for these prompts; from six on for others like them, and where their spread alone is too large, `seeds` is NA
    and `limit`, the half-width that no number of seeds undercuts (as estimated), says what more prompts are needed for.
    Columns: concept, position, prompts, seeds_now, half_width (now), seeds, pictures (of those seeds, this window and
    its baseline), limit. Raises `LocogenError` for one seed, a width that is not positive, or a level that is none.
    """
    import pandas as pd

    if not (interval > 0 and 0 < level < 1 and 0 < assurance < 1):
        given = f"interval={interval}, level={level}, assurance={assurance}"
        raise LocogenError(f"{given}: give a positive width, and shares between 0 and 1")
    lines = []
    for name, rows in run.table.groupby("concept", sort=False):
        effects = effect(rows)
        layer: Any = effects[effects["axis"] == "layer"].set_index("position")
        start = carrier(effects).start
        at = int(layer["choose"].idxmax()) if start is None else start
        values = _of_window(rows, at)
        seeds, now, limit = _needed(values, interval, level, assurance)
        prompts, there = values.shape
        pictures = pd.NA if seeds is None else 2 * prompts * seeds
        told = {"concept": name, "position": at, "prompts": prompts, "seeds_now": there, "half_width": now}
        lines.append(told | {"seeds": pd.NA if seeds is None else seeds, "pictures": pictures, "limit": limit})
    return pd.DataFrame(lines).astype({"seeds": "Int64", "pictures": "Int64"})


def _of_window(rows: Any, start: int) -> Array:
    """Effects of one window, (prompts, seeds)."""
    part = rows[(rows["role"] == "baseline") | ((rows["role"] == "window") & (rows["start"] == start))]
    score: Any = part.pivot_table(index=["prompt", "seed"], columns="role", values="clip_score")
    effects = sign_of(rows["kind"].iloc[0]) * (score["window"] - score["baseline"])
    return effects.unstack("seed").to_numpy()


def _needed(values: Array, interval: float, level: float, assurance: float) -> tuple[int | None, float, float]:
    """Seeds needed (None: no number will do), the half-width now, and what remains with endless seeds."""
    prompts, seeds = values.shape
    if seeds < 2:
        raise LocogenError("one seed tells nothing of how seeds differ: run localize with at least two")
    random = prompts >= FEW_PROMPTS
    spread = _Spread(values, random)
    now = spread.half_width(seeds, level)
    limit = spread.limit(level)
    if limit >= interval or spread.within(MOST, interval, level) < assurance:
        return None, now, limit
    low, high = 1, 2
    while spread.within(high, interval, level) < assurance:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if spread.within(middle, interval, level) >= assurance else (middle, high)
    return high, now, limit


class _Spread:
    """The variances behind an interval: of prompt means, of seed means, and of what is left (a two-way layout).

    What is not known of them is drawn once: variance * freedom / chi2(freedom), their fiducial distribution.
    """

    def __init__(self, values: Array, random: bool) -> None:
        self.prompts, self.pilot = values.shape
        self.random = random
        self.by_seed = float(values.mean(0).var(ddof=1))
        self.by_prompt = float(values.mean(1).var(ddof=1)) if random else 0.0
        rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
        freedom = max(1, (self.prompts - 1) * (self.pilot - 1))
        self.rest = float((rest**2).sum() / freedom)
        dice = np.random.default_rng(0)
        self.seed_draws = self.by_seed * (self.pilot - 1) / dice.chisquare(self.pilot - 1, DRAWS)
        prompt_draws = self.by_prompt * (self.prompts - 1) / dice.chisquare(max(1, self.prompts - 1), DRAWS)
        self.rest_draws = self.rest * freedom / dice.chisquare(freedom, DRAWS)
        self.own_draws = np.maximum(prompt_draws - self.rest_draws / self.pilot, 0)  # of prompts, seeds aside

    def limit(self, level: float) -> float:
        """Half-width with endless seeds."""
        if not self.random:
            return 0.0
        own = max(self.by_prompt - self.rest / self.pilot, 0)
        return float(student_quantile((1 - level) / 2, self.prompts - 1) * math.sqrt(own / self.prompts))

    def half_width(self, seeds: int, level: float) -> float:
        """Half-width with the variances as estimated now."""
        return float(self._width(np.array([self.by_prompt]), np.array([self.by_seed]), seeds, level)[0])

    def within(self, seeds: int, interval: float, level: float) -> float:
        """Probability that the half-width with so many seeds is at most `interval`."""
        dice = np.random.default_rng(1)
        by_prompt = self.own_draws + self.rest_draws / seeds
        by_prompt = by_prompt * dice.chisquare(max(1, self.prompts - 1), DRAWS) / max(1, self.prompts - 1)
        by_seed = self.seed_draws * dice.chisquare(seeds - 1, DRAWS) / (seeds - 1)
        return float((self._width(by_prompt * self.random, by_seed, seeds, level) <= interval).mean())

    def _width(self, by_prompt: Array, by_seed: Array, seeds: int, level: float) -> Array:
        """Student's half-width as `stats.crossed_bootstrap` makes it, Satterthwaite's degrees of freedom."""
        a, b = by_prompt / self.prompts, by_seed / seeds
        total = np.maximum(a + b, 1e-300)
        freedom = total**2 / np.maximum(a**2 / max(1, self.prompts - 1) + b**2 / (seeds - 1), 1e-300)
        grid, critical = _critical(level)
        return np.interp(np.log(freedom), np.log(grid), critical) * np.sqrt(total)


@functools.cache
def _critical(level: float) -> tuple[Array, Array]:
    """Student's t over degrees of freedom; from 1000 on they hardly change it."""
    grid = np.geomspace(1, 1000, 40)
    return grid, np.array([student_quantile((1 - level) / 2, freedom) for freedom in grid])
