"""Answers scored against what was planted: tables in, tables out.

Plants are the unit: concepts of one plant share its training. So a score is the mean over plants of
the mean over a plant's concepts, and its interval speaks of other plants like these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from locogen import stats
from locogen.benchmarks.answers import CANNOT_TELL, NAMING
from locogen.benchmarks.faithfulness import (
    circuit_distance,
    circuit_performance,
    faithfulness,
)
from locogen.plan import Window, parse_layers

if TYPE_CHECKING:
    import pandas as pd

    from locogen.benchmarks.subjects import Truth

Array = np.ndarray[Any, Any]
SETTING = ("window", "guidance_scale", "prompts", "seeds")

# Kinds of truth whose places can be named.
PLACED = NAMING
# Kinds of truth for which a single place is a false name.
NOT_SINGLE = ("nobody", "each sufficient", "spread")
# An effect within this is none that anybody would speak of, in the unit of the score: admission
# lets a plant have small effects elsewhere.
NEAR_ZERO = 0.02
# With less between baseline and ceiling, their difference divides nothing.
SMALLEST_WHOLE = 0.05
SHARE, MEAN = "share", "mean"  # how the interval of a measure is made


class Measure(NamedTuple):
    """One column of scores: how its interval is made, its bounds, and what it says."""

    interval: str
    low: float
    high: float
    says: str


MEASURES: Mapping[str, Measure] = {
    "hit": Measure(SHARE, 0, 1, "a named place shares a layer with a planted one, none is apart"),
    "off_by_one": Measure(SHARE, 0, 1, "no hit, but every named place is next to a planted one"),
    "elsewhere": Measure(SHARE, 0, 1, "a named place shares no layer with a planted one"),
    "complete": Measure(SHARE, 0, 1, "a hit in which every planted place is named"),
    "false_single": Measure(SHARE, 0, 1, "one place named where there is none, any of two, or all"),
    "right_kind": Measure(SHARE, 0, 1, "the kind of answer is right"),
    "inconclusive": Measure(SHARE, 0, 1, "the answer is that it cannot be told"),
    "right_side": Measure(SHARE, 0, 1, "the side that knows a fact is named"),
    "wrong_side": Measure(SHARE, 0, 1, "the other side is named"),
    "auroc": Measure(MEAN, 0, 1, "planted layers before others in the ranking; 0.5 is chance"),
    "cpr": Measure(MEAN, -math.inf, math.inf, "what the best layers bring alone; high is good"),
    "cmd": Measure(MEAN, 0, math.inf, "how far from all of it they stay; low is good"),
    "coverage": Measure(SHARE, 0, 1, "intervals outside the plant that hold 0"),
    "coverage_near": Measure(SHARE, 0, 1, f"intervals there that meet 0 ± {NEAR_ZERO:g}"),
}
COSTS = ("pictures", "rows", "calls", "seconds")


# --- one answer ----------------------------------------------------------------------------------


def measures(
    truth: Truth,
    kind: str,
    places: Sequence[Window],
    *,
    profile: Array | None = None,
    effects: Sequence[Mapping[str, Any]] = (),
    width: int = 1,
    side: str | None = None,
    circuit: Mapping[int, float] | None = None,
) -> dict[str, float]:
    """Every measure of one answer; NaN where it does not apply.

    Args:
        truth: What is known.
        kind: The kind of the answer.
        places: Its places.
        profile: A value for each layer, (layers,).
        effects: Lines with position, estimate, low, high.
        width: Layers of an effect's window.
        side: The side it names; "": cannot tell, None: it does not ask.
        circuit: Scores of pictures from the best layers, see `faithfulness`.
    """
    values = dict.fromkeys(MEASURES, math.nan)
    if not truth.scored:
        return values
    values |= _of_kind(truth, kind)
    values |= _of_places(truth, kind, places)
    values |= _of_side(truth, side)
    values |= _of_ranking(truth, profile)
    values |= _of_circuit(truth, circuit)
    if truth.kind:
        values |= _coverage(truth, effects, width)
    return values


def _of_kind(truth: Truth, kind: str) -> dict[str, float]:
    values = {"inconclusive": float(kind == "inconclusive")}
    if truth.kind:
        values["right_kind"] = float(kind == truth.kind)
    if truth.kind in NOT_SINGLE:
        values["false_single"] = float(kind == "one place")
    return values


def _of_side(truth: Truth, side: str | None) -> dict[str, float]:
    if not truth.side or side is None:
        return {}
    return {
        "right_side": float(side == truth.side),
        "wrong_side": float(side not in (truth.side, CANNOT_TELL)),
    }


def _of_ranking(truth: Truth, profile: Array | None) -> dict[str, float]:
    if not truth.kind or not truth.layers or profile is None:
        return {}
    return {"auroc": auroc(profile, truth.layers)}


def _of_circuit(truth: Truth, circuit: Mapping[int, float] | None) -> dict[str, float]:
    if not truth.layers or not circuit:
        return {}
    curve = faithfulness(circuit, SMALLEST_WHOLE)
    return {"cpr": circuit_performance(curve), "cmd": circuit_distance(curve)}


def _of_places(truth: Truth, kind: str, places: Sequence[Window]) -> dict[str, float]:
    """Whether the named places are the planted ones; nothing where none can be named."""
    if truth.kind not in PLACED:
        return {}
    named = places if kind in NAMING else ()
    # That of the worst place decides; without a place there is none.
    farthest = max((_distance(place, truth.layers) for place in named), default=None)
    is_hit = farthest == 0
    return {
        "hit": float(is_hit),
        "off_by_one": float(farthest == 1),
        "elsewhere": float(farthest not in (None, 0)),
        "complete": float(is_hit and _names_each(named, truth)),
    }


def _names_each(named: Iterable[Window], truth: Truth) -> bool:
    """Whether every planted place has a layer among the named ones."""
    layers = {layer for place in named for layer in place}
    return all(layers & set(place) for place in truth.places)


def _distance(place: Window, layers: Iterable[int]) -> int:
    """Layers from a place to the nearest planted one; 0 where they share one."""
    return min(abs(one - other) for one in place for other in layers)


def _coverage(truth: Truth, effects: Sequence[Mapping[str, Any]], width: int) -> dict[str, float]:
    """Shares of the intervals that hold zero, where the effect is known to be zero."""
    bounds = []
    for line in effects:
        window = range(int(line["position"]), int(line["position"]) + width)
        low, high = _number(line.get("low")), _number(line.get("high"))
        if not truth.layers & set(window) and not math.isnan(low + high):
            bounds.append((low, high))
    if not bounds:
        return {}
    holds = [low <= 0 <= high for low, high in bounds]
    meets = [low <= NEAR_ZERO and high >= -NEAR_ZERO for low, high in bounds]
    return {"coverage": float(np.mean(holds)), "coverage_near": float(np.mean(meets))}


def auroc(profile: Array, planted: Iterable[int]) -> float:
    """How often a planted layer has a larger value than another one; ties count half.

    >>> auroc(np.array([0.1, 0.9, 0.8, 0.1]), {1, 2})
    1.0
    """
    inside = np.zeros(len(profile), bool)
    inside[list(planted)] = True
    if inside.all() or not inside.any():
        return math.nan
    gaps = profile[inside][:, None] - profile[~inside]  # (planted, others)
    return float((gaps > 0).mean() + (gaps == 0).mean() / 2)


def share_at(
    truth: Truth, effects: Sequence[Mapping[str, Any]], width: int
) -> dict[str, float | int | None]:
    """The share of the ceiling that a localizer gives to the planted place, with its interval.

    Of the windows that share layers with it, the one with the most layers of it, then the one with
    the largest share.
    """
    best: dict[str, float | int | None] = dict.fromkeys(("share", "share_low", "share_high"))
    largest = (0, -math.inf)
    for line in effects:
        window = range(int(line["position"]), int(line["position"]) + width)
        share = _number(line.get("share"))
        rank = (len(truth.layers & set(window)), share)
        if rank[0] and not math.isnan(share) and rank > largest:
            largest = rank
            best = {name: _number(line.get(name)) for name in best}
    return best


def _number(value: Any) -> float:
    """A number of a file, where NaN is null."""
    return math.nan if value is None else float(value)


# --- tables --------------------------------------------------------------------------------------


def places_text(places: Iterable[Window]) -> str:
    """Places as the tables write them: "0-1, 12-13"."""
    return ", ".join(place.label for place in places)


def places_of(text: str) -> tuple[Window, ...]:
    """The places of a table's text; the inverse of `places_text`.

    >>> places_of("0-1, 13")
    (Window(start=0, width=2, reason=''), Window(start=13, width=1, reason=''))
    """
    parts = [part for part in text.split(",") if part.strip()]
    return tuple(Window.of(parse_layers(part)) for part in parts)


def scores(table: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Each measure by localizer and setting, with its 95 % interval over plants.

    Args:
        table: The table of a `Benchmark`.
        by: Further columns to group by, such as "rule".

    Returns:
        One row a group and measure that applies: the columns of the group, `measure`, `value`,
        `low`, `high`, and how many `plants` and `cells` it is of. Intervals of shares are Wilson's
        with plants as trials; those of means Student's over plants.
    """
    import pandas as pd

    groups = ["localizer", *SETTING, *by]
    lines = []
    grouped: Any = table.groupby(groups, sort=False, dropna=False)
    for key, part in grouped:
        place = dict(zip(groups, key, strict=True))
        for name, measure in MEASURES.items():
            line = _score(part, name, measure)
            if line is not None:
                lines.append(place | line)
    columns = [*groups, "measure", "value", "low", "high", "plants", "cells"]
    return pd.DataFrame(lines, columns=columns)


def _score(part: Any, name: str, measure: Measure) -> dict[str, Any] | None:
    values: Any = part[["plant", name]].dropna()
    if values.empty:
        return None
    means = values.groupby("plant")[name].mean().to_numpy(np.float64)  # (plants,)
    value = float(means.mean())
    if measure.interval == SHARE:
        low, high = stats.wilson(float(means.sum()), len(means))
    else:
        low, high = _student(means)
    return {
        "measure": name,
        "value": value,
        "low": max(low, measure.low),
        "high": min(high, measure.high),
        "plants": len(means),
        "cells": len(values),
    }


def _student(means: Array) -> tuple[float, float]:
    """Student's 95 % interval of a mean; NaN for a single one."""
    count = len(means)
    if count < 2:
        return math.nan, math.nan
    half = stats.student_quantile(0.025, count - 1) * means.std(ddof=1) / math.sqrt(count)
    return float(means.mean() - half), float(means.mean() + half)


def costs(table: pd.DataFrame) -> pd.DataFrame:
    """Pictures, denoiser rows and calls and seconds of one answer on average, by localizer.

    Seconds are those of answers whose pictures were all made for them: `timed` counts these.
    """
    groups = ["localizer", *SETTING]
    fresh = table.assign(seconds=table["seconds"].where(table["fresh"]))
    grouped: Any = fresh.groupby(groups, sort=False, dropna=False)
    means = grouped[list(COSTS)].mean()
    means["timed"] = grouped["seconds"].count()
    return means.reset_index()


def kinds_answered(table: pd.DataFrame) -> pd.DataFrame:
    """How often each kind of answer was given, by localizer and right kind; scored cells only."""
    import pandas as pd

    scored: Any = table[table["scored"] & (table["truth"] != "")]
    return pd.crosstab([scored["localizer"], scored["truth"]], scored["kind"])
