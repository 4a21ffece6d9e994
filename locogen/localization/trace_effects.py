"""What causal tracing found: how much of the score each restored state brings back, as an effects table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from locogen import stats
from locogen.errors import LocogenError
from locogen.localization.effects import ALPHA, MIN_SHARE, _estimates, _judged
from locogen.plan import Window

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, Any]
METHOD = "causal tracing"
LAYERS = "cross-attention"  # the part whose states are counted as LocoGen's layers are


class BestState(NamedTuple):
    """The state that brings back most: chosen on some seeds, measured on the others.

    `share`: of what the noise took; `p_value`: of "no state brings anything back", corrected for all states;
    `reason`: why it is not the one place, if it is not; empty where it is.
    """

    axis: str
    position: int
    estimate: float
    low: float
    high: float
    share: float
    p_value: float
    reason: str


class Sides(NamedTuple):
    """The best state of the text encoder and of the denoiser, and by how much the first brings back more.

    Each is chosen on some seeds, the difference measured on the others, for these prompts (paired, 95 %). `reason`:
    why no side is told: even the best of both is not the one place (`best_state`), or seeds are too few; else empty.
    """

    text: str
    denoiser: str
    lead: float
    low: float
    high: float
    reason: str = ""

    @property
    def side(self) -> str | None:
        """`"text encoder"` or `"denoiser"`; None where the interval holds zero, or no state is the one place."""
        if self.reason or not (self.low > 0 or self.high < 0):
            return None
        return "text encoder" if self.low > 0 else "denoiser"


def recovered(table: pd.DataFrame) -> dict[str, Array]:
    """Score restored minus corrupted, per part (states, prompts, seeds), averaged over a seed's noises.

    `"ceiling"`, (1, prompts, seeds), is clean minus corrupted: what restoring everything brings back. Raises
    `LocogenError` for a table of several concepts, missing rows, or scores that are not finite.
    """
    import pandas as pd

    rows: Any = table
    if rows["concept"].nunique() != 1 or not {"baseline", "corrupted", "restored"} <= set(rows["role"]):
        raise LocogenError("this is not the table of one concept's causal_trace: give run.table, of one run")
    cell = ["prompt", "seed"]
    noisy = rows[rows["role"] == "corrupted"].set_index([*cell, "noise"])["clip_score"]
    clean = rows[rows["role"] == "baseline"].set_index(cell)["clip_score"]
    back = rows[rows["role"] == "restored"]
    before = noisy.reindex(pd.MultiIndex.from_frame(back[[*cell, "noise"]])).to_numpy()
    back = back.assign(gain=back["clip_score"].to_numpy() - before)
    prompts, seeds = list(dict.fromkeys(rows["prompt"])), sorted(rows["seed"].unique())
    cubes = {}
    for axis, part in back.groupby("axis", sort=False):
        states = sorted(part["start"].unique())
        index = pd.MultiIndex.from_product([states, prompts, seeds])
        means = part.groupby(["start", *cell])["gain"].mean().reindex(index).to_numpy()
        cubes[str(axis)] = means.reshape(len(states), len(prompts), len(seeds))
    lost = clean - noisy.groupby(cell).mean()
    cubes["ceiling"] = (
        lost.reindex(pd.MultiIndex.from_product([prompts, seeds])).to_numpy().reshape(1, len(prompts), len(seeds))
    )
    if not all(np.isfinite(cube).all() for cube in cubes.values()):
        raise LocogenError("some rows of the trace are missing or not scored: run causal_trace again on the same store")
    return cubes


def trace_effect(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """The effects table of a causal trace, one line a state: its `axis` is the part, its `position` the layer.

    Columns as in `effects.effect`: `choose` and `fresh` are measured on different seeds, `share` is of the axis
    "ceiling" (what the noise took), `p_any` of "brings nothing back", corrected for the states of its axis.
    Raises `LocogenError` as `recovered` does.
    """
    import pandas as pd

    cubes = recovered(table)
    ceiling, zero = cubes["ceiling"], np.zeros_like(cubes["ceiling"])
    name, kind, seeds = table["concept"].iloc[0], table["kind"].iloc[0], ceiling.shape[2]
    lines: list[dict[str, Any]] = []
    for axis, values in cubes.items():
        found = _estimates(axis, range(len(values)) if axis != "ceiling" else [pd.NA], values, level)
        if axis != "ceiling":
            judged = _judged(values, ceiling if ceiling.any() else None, zero, seeds, 1, level)
            found = [{**line, **more} for line, more in zip(found, judged, strict=True)]
        lines += found
    base: Any = table.loc[table["role"] == "baseline", "clip_score"]
    known = {"method": METHOD, "concept": name, "kind": kind, "width": 1, "baseline": base.mean()}
    frame = pd.DataFrame([{**known, **line} for line in lines])
    first = ["method", "concept", "axis", "position", "estimate", "low", "high", "n"]
    return frame.reindex(columns=[*first, *(c for c in frame.columns if c not in first)]).astype({"position": "Int64"})


def best_state(table: pd.DataFrame) -> BestState:
    """The state of any part that brings back most, and whether it is the one place.

    It is where the noise does something, the state brings something back (p <= 0.05, all states counted) and at least
    half of what the noise took. Raises `LocogenError` as `recovered` does.
    """
    cubes = recovered(table)
    places, values = _stacked({axis: cube for axis, cube in cubes.items() if axis != "ceiling"})
    at, found, share = _chosen(values, cubes["ceiling"])
    p_value = float(stats.any_effect(values, np.zeros_like(values[0]), alpha=ALPHA).p_value[at])
    lost = stats.crossed_bootstrap(cubes["ceiling"])
    reason = ""
    if not lost.low[0] > 0:
        reason = "the noise hardly changes the score"
    elif not p_value <= ALPHA:
        reason = "no state brings back more than chance would"
    elif share < MIN_SHARE:
        reason = f"the best state brings back {share:.0%} of what the noise took"
    return BestState(*places[at], *found, share, p_value, reason)


def layer_found(effects: pd.DataFrame) -> Window:
    """The cross-attention layer that brings back enough to be called the carrier, as `effects.carrier` would."""
    table: Any = effects
    lines = table[table["axis"] == LAYERS].set_index("position")
    if lines.empty:
        raise LocogenError(f"the trace has no {LAYERS} states: leave parts= as it is")
    start = int(lines["choose"].idxmax())
    best = lines.loc[start]
    if not table[table["axis"] == "ceiling"]["low"].iloc[0] > 0:
        return Window(None, 1, "the noise hardly changes the score")
    if not best["p_any"] <= ALPHA or best["fresh"] <= 0:
        return Window(None, 1, f"no layer brings back more than chance would; the most, layer {start}")
    if best["share"] < MIN_SHARE:
        return Window(None, 1, f"the best, layer {start}, brings back {best['share']:.0%} of what the noise took")
    ahead = best["p_lead"] <= ALPHA
    return Window(start, 1, "ahead of every other layer" if ahead else "its lead over other layers is not established")


def sides(table: pd.DataFrame) -> Sides | None:
    """Which side brings back more, by its best state; None where the trace has states of one side only."""
    cubes = {axis: cube for axis, cube in recovered(table).items() if axis != "ceiling"}
    text = {axis: cube for axis, cube in cubes.items() if axis.startswith("text ")}
    rest = {axis: cube for axis, cube in cubes.items() if axis not in text}
    if not text or not rest:
        return None
    picked, kept = map(list, stats.split_seeds(range(next(iter(cubes.values())).shape[2])))
    names, curves = [], []
    for group in (text, rest):
        places, values = _stacked(group)
        at = int(values[:, :, picked].mean((1, 2)).argmax())
        names.append("{}, layer {}".format(*places[at]))
        curves.append(values[at][:, kept])
    found = stats.crossed_bootstrap((curves[0] - curves[1])[None], prompts="fixed")
    lead, low, high = (float(end[0]) for end in (found.estimate, found.low, found.high))
    reason = best_state(table).reason
    if picked == kept:
        reason = reason or "under four seeds cannot both choose the states and compare them"
    return Sides(names[0], names[1], lead, low, high, reason)


def _stacked(cubes: dict[str, Array]) -> tuple[list[tuple[str, int]], Array]:
    """All states of several parts in one array, and their (axis, position)."""
    places = [(axis, i) for axis, cube in cubes.items() for i in range(len(cube))]
    return places, np.concatenate(list(cubes.values()))


def _chosen(values: Array, ceiling: Array) -> tuple[int, tuple[float, float, float], float]:
    """The state chosen on some seeds; on the others its estimate with interval, and its share of the ceiling."""
    picked, kept = map(list, stats.split_seeds(range(values.shape[2])))
    at = int(values[:, :, picked].mean((1, 2)).argmax())
    fresh = values[at][:, kept]
    found = stats.crossed_bootstrap(fresh[None], prompts="fixed" if picked != kept else None)
    lost = float(ceiling[:, :, kept].mean())
    share = float(fresh.mean()) / lost if lost > 0 else float("nan")
    return at, (float(found.estimate[0]), float(found.low[0]), float(found.high[0])), share
