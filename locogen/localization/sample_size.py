"""Sample size: how many seeds an interval of a given half-width takes, from a first run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.errors import LocogenError
from locogen.localization.effects import Scores, carrier, effect, score_used
from locogen.localization.spread import seeds_needed

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.runs import Run

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
        seeds, half_width, limit = seeds_needed(values, interval, level, assurance)
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
    return Scores(part, score_used(rows)).effect_of("window")[0]
