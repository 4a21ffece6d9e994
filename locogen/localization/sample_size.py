"""Sample size: how many seeds an interval of a given half-width takes, from a first run."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.errors import LocogenError
from locogen.localization.effects import Scores, carrier, effect
from locogen.stats import FEW_PROMPTS, student_quantile

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.runs import Run

DRAWS = 4000  # of what is not known about the variances, and of runs to come
MOST = 4096  # seeds
TINY = 1e-300  # replaces a variance of zero in a quotient
Array = np.ndarray[Any, Any]


def plan_seeds(
    run: Run, interval: float = 0.01, *, level: float = 0.95, assurance: float = 0.8
) -> pd.DataFrame:
    """Plan how many seeds measure each concept's best window to within ± `interval`.

    Args:
        run: A first run of `localize`, with at least two seeds.
        interval: Half the width of the interval between `low` and `high` in `effect`, in units of
            the score.
        level: Coverage of the interval.
        assurance: Probability that the interval to come is that narrow. Few first seeds say little
            about the spread, and then more are asked for (Kupper & Hafner, Am. Stat. 43, 1989).

    Returns:
        One row a concept: concept, position (of the window), prompts, seeds_now, half_width (now),
        seeds (needed), pictures (of that many seeds, the window and its baseline), limit (the
        half-width with endless seeds). With fewer than six prompts the interval speaks for these
        prompts; from six on it speaks for others like them, and if their spread alone is too large,
        `seeds` is NA: more prompts are needed.

    Raises:
        LocogenError: For one seed, a width that is not positive, or a level outside 0 to 1.

    Example:
        >>> from types import SimpleNamespace
        >>> import pandas as pd
        >>> scores = {"baseline": [0.6, 0.6, 0.6], "window": [0.1, 0.2, 0.3]}
        >>> rows = [(role, seed, scores[role][seed]) for role in scores for seed in range(3)]
        >>> table = pd.DataFrame(rows, columns=["role", "seed", "clip_score"])
        >>> table = table.assign(concept="neon", kind="style", prompt="a cat", content_score=0.5)
        >>> table["start"] = table["role"].map({"window": 4})
        >>> table["width"] = table["role"].map({"window": 2})
        >>> plan_seeds(SimpleNamespace(table=table), 0.1)[["position", "seeds_now", "seeds"]]
           position  seeds_now  seeds
        0         4          3     20
    """
    import pandas as pd

    if not (interval > 0 and 0 < level < 1 and 0 < assurance < 1):
        raise LocogenError(
            f"interval={interval}, level={level}, assurance={assurance}: "
            "give a positive width, and shares between 0 and 1"
        )
    lines = []
    for name, rows in run.table.groupby("concept", sort=False):
        start = _best_window(rows)
        values = _effects_of(rows, start)
        seeds, half_width, limit = _needed(values, interval, level, assurance)
        prompts, seeds_now = values.shape
        line = {"concept": name, "position": start, "prompts": prompts, "seeds_now": seeds_now}
        line["half_width"] = half_width
        line["seeds"] = pd.NA if seeds is None else seeds
        # The window and its baseline, on every prompt and seed.
        line["pictures"] = pd.NA if seeds is None else 2 * prompts * seeds
        line["limit"] = limit
        lines.append(line)
    return pd.DataFrame(lines).astype({"seeds": "Int64", "pictures": "Int64"})


def _best_window(rows: Any) -> int:
    """The first layer of the carrier, or of the window with the largest choice."""
    effects = effect(rows)
    start = carrier(effects).start
    if start is not None:
        return start
    layers: Any = effects[effects["axis"] == "layer"].set_index("position")
    return int(layers["choose"].idxmax())


def _effects_of(rows: Any, start: int) -> Array:
    """Effects of one window, (prompts, seeds)."""
    is_window = (rows["role"] == "window") & (rows["start"] == start)
    part = rows[is_window | (rows["role"] == "baseline")]
    return Scores(part).effect_of("window")[0]


def _needed(
    values: Array, interval: float, level: float, assurance: float
) -> tuple[int | None, float, float]:
    """Seeds needed (None: no number will do), the half-width now, and that with endless seeds.

    `values`: effects of one window, (prompts, seeds).
    """
    prompts, seeds = values.shape
    if seeds < 2:
        raise LocogenError(
            "one seed tells nothing of how seeds differ: run localize with at least two"
        )
    spread = _Spread(values, prompts >= FEW_PROMPTS)
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


class _Spread:
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
