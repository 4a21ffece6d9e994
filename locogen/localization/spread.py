"""How many seeds narrow an interval to a given width, by the variances of a first run."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from locogen.errors import LocogenError
from locogen.stats import FEW_PROMPTS, student_quantile

DRAWS = 4000  # of what is not known about the variances, and of runs to come
MOST = 4096  # seeds
TINY = 1e-300  # replaces a variance of zero in a quotient
Array = np.ndarray[Any, Any]


def seeds_needed(
    values: Array, interval: float, level: float = 0.95, assurance: float = 0.8
) -> tuple[int | None, float, float]:
    """Seeds needed (None: no number will do), the half-width now, and that with endless seeds.

    `values`: effects of one window, (prompts, seeds).
    """
    prompts, seeds = values.shape
    if seeds < 2:
        raise LocogenError(
            "one seed tells nothing of how seeds differ: run localize with at least two"
        )
    spread = Spread(values, prompts >= FEW_PROMPTS)
    now = spread.half_width(seeds, level)
    limit = spread.limit(level)
    if limit >= interval or spread.within(MOST, interval, level) < assurance:
        return None, now, limit

    # More seeds only help: double until there are enough, then bisect.
    too_few = 1
    enough = 2
    while spread.within(enough, interval, level) < assurance:
        too_few = enough
        enough = 2 * enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if spread.within(middle, interval, level) >= assurance:
            enough = middle
        else:
            too_few = middle
    return enough, now, limit


class Spread:
    """The variances behind an interval: of prompt means, of seed means, and the rest.

    A two-way layout. What is not known about the variances is drawn once: variance * freedom /
    chi2(freedom), their fiducial distribution.
    """

    def __init__(self, values: Array, random: bool) -> None:
        """`values`: effects, (prompts, seeds); `random`: whether prompts are resampled."""
        self.prompts, self.pilot = values.shape
        self.random = random
        self.prompt_freedom = max(1, self.prompts - 1)
        seed_freedom = self.pilot - 1
        rest_freedom = max(1, (self.prompts - 1) * seed_freedom)

        self.by_seed = float(values.mean(0).var(ddof=1))
        self.by_prompt = float(values.mean(1).var(ddof=1)) if random else 0.0
        rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
        self.rest = float((rest**2).sum() / rest_freedom)

        dice = np.random.default_rng(0)  # (DRAWS,) each; the order of draws is part of the result
        self.seed_draws = self.by_seed * seed_freedom / dice.chisquare(seed_freedom, DRAWS)
        by_prompt = self.by_prompt * (self.prompts - 1)
        prompt_draws = by_prompt / dice.chisquare(self.prompt_freedom, DRAWS)
        self.rest_draws = self.rest * rest_freedom / dice.chisquare(rest_freedom, DRAWS)
        # Prompts alone: their means also vary by what is left of the seeds.
        self.alone_draws = np.maximum(prompt_draws - self.rest_draws / self.pilot, 0)

    def limit(self, level: float) -> float:
        """Half-width with endless seeds."""
        if not self.random:
            return 0.0
        alone = max(self.by_prompt - self.rest / self.pilot, 0)
        critical = student_quantile((1 - level) / 2, self.prompts - 1)
        return float(critical * math.sqrt(alone / self.prompts))

    def half_width(self, seeds: int, level: float) -> float:
        """Half-width with the variances as estimated now."""
        by_prompt = np.array([self.by_prompt])
        by_seed = np.array([self.by_seed])
        return float(self._half_widths(by_prompt, by_seed, seeds, level)[0])

    def within(self, seeds: int, interval: float, level: float) -> float:
        """Probability that the half-width with this many seeds is at most `interval`."""
        dice = np.random.default_rng(1)  # the same for every number of seeds: bisection needs that
        by_prompt = self.alone_draws + self.rest_draws / seeds  # (DRAWS,)
        by_prompt = by_prompt * dice.chisquare(self.prompt_freedom, DRAWS) / self.prompt_freedom
        by_seed = self.seed_draws * dice.chisquare(seeds - 1, DRAWS) / (seeds - 1)
        half_widths = self._half_widths(by_prompt * self.random, by_seed, seeds, level)
        return float((half_widths <= interval).mean())

    def _half_widths(self, by_prompt: Array, by_seed: Array, seeds: int, level: float) -> Array:
        """Student's half-widths as in `stats.crossed_bootstrap`, (draws,) each."""
        from_prompts = by_prompt / self.prompts
        from_seeds = by_seed / seeds
        total = np.maximum(from_prompts + from_seeds, TINY)
        # Satterthwaite's degrees of freedom.
        parts = from_prompts**2 / self.prompt_freedom + from_seeds**2 / (seeds - 1)
        freedom = total**2 / np.maximum(parts, TINY)
        grid, critical = _critical(level)
        return np.interp(np.log(freedom), np.log(grid), critical) * np.sqrt(total)


@functools.cache
def _critical(level: float) -> tuple[Array, Array]:
    """Student's t over degrees of freedom; from 1000 on they hardly change it."""
    grid = np.geomspace(1, 1000, 40)
    return grid, np.array([student_quantile((1 - level) / 2, freedom) for freedom in grid])
