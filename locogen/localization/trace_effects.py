"""What causal tracing found: how much of the score each restored state brings back.

In the words of causal mediation analysis, what restoring one state brings back is its average
*indirect effect*, and what restoring everything would bring back is the *total effect*: the score
of the clean picture minus that of the corrupted one (Meng et al. 2022, arXiv 2202.05262).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from locogen import stats
from locogen.errors import LocogenError
from locogen.localization.effects import (
    MIN_SHARE,
    carrier_evidence,
    effects_table,
    estimates,
)
from locogen.markup import interval_text, percent
from locogen.plan import Window

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, Any]
METHOD = "causal tracing"
LAYERS = "cross-attention"  # the part whose states are counted as LocoGen's layers are
TOTAL = "ceiling"  # the axis of the total effect, named as in LocoGen's effects table


class BestState(NamedTuple):
    """The state with the largest indirect effect: chosen on some seeds, measured on the others.

    `share`: of the total effect; `p_value`: of "no state brings anything back", corrected for all
    states; `reason`: why it is not the one place, if it is not; empty where it is.
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
    """The best states of text encoder and denoiser, and how much more the first brings back.

    Each is chosen on some seeds, the difference measured on the others, for these prompts (paired,
    95 %). `reason`: why no side is named: even the best of both is not the one place
    (`best_state`), or seeds are too few; else empty.
    """

    text: str
    denoiser: str
    lead: float
    low: float
    high: float
    reason: str = ""

    @property
    def side(self) -> str | None:
        """The side with the better state; None if the interval holds 0 or there is a `reason`."""
        if self.reason:
            return None
        if self.low > 0:
            return "text encoder"
        return "denoiser" if self.high < 0 else None


def recovered(table: pd.DataFrame) -> dict[str, Array]:
    """Indirect effects by part, (states, prompts, seeds): score restored minus score corrupted.

    Averaged over the noises of a seed. The key "ceiling", (1, prompts, seeds), is the total effect:
    score clean minus score corrupted.

    Raises:
        LocogenError: For a table of several concepts, missing rows, or scores that are not finite.
    """
    rows: Any = table
    roles = {"baseline", "corrupted", "restored"}
    if rows["concept"].nunique() != 1 or not roles <= set(rows["role"]):
        raise LocogenError(
            "this is not the table of one concept's causal_trace: give run.table, of one run"
        )
    cells = {"prompt": list(dict.fromkeys(rows["prompt"])), "seed": sorted(rows["seed"].unique())}
    cubes = {}
    for axis, part in _indirect_effects(rows).groupby("axis", sort=False):
        means = part.groupby(["start", *cells])["gain"].mean().reset_index()
        states = sorted(part["start"].unique())
        cubes[str(axis)] = stats.cube(means, "gain", {"start": states, **cells})
    cubes[TOTAL] = _total_effect(rows, cells)
    if not all(np.isfinite(cube).all() for cube in cubes.values()):
        raise LocogenError(
            "some rows of the trace are missing or not scored: "
            "run causal_trace again on the same store"
        )
    return cubes


def _indirect_effects(rows: Any) -> Any:
    """The restored rows with their `gain` over the corrupted picture of the same noise."""
    import pandas as pd

    condition = ["prompt", "seed", "noise"]
    corrupted = rows[rows["role"] == "corrupted"].set_index(condition)["clip_score"]
    restored = rows[rows["role"] == "restored"]
    before = corrupted.reindex(pd.MultiIndex.from_frame(restored[condition])).to_numpy()
    return restored.assign(gain=restored["clip_score"].to_numpy() - before)


def _total_effect(rows: Any, cells: Mapping[str, Any]) -> Array:
    """Score clean minus score corrupted, averaged over noises, (1, prompts, seeds)."""
    clean = rows[rows["role"] == "baseline"].set_index(list(cells))["clip_score"]
    corrupted = rows[rows["role"] == "corrupted"].groupby(list(cells))["clip_score"].mean()
    lost = (clean - corrupted).rename("lost").reset_index()
    return stats.cube(lost, "lost", cells)[None]


def trace_effect(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Compute the effects table of a causal trace: the indirect effect of each restored state.

    Args:
        table: The pictures table of one `causal_trace`.
        level: Coverage of the intervals.

    Returns:
        One row a state: `axis` is the part of the model, `position` its layer; other columns are
        those of `effect`. The axis "ceiling" is the total effect (what the noise took), `share` is
        of it, and `p_any` is of "brings nothing back", corrected for the states of its axis.

    Raises:
        LocogenError: For a table of several concepts, missing rows, or scores that are not finite.

    Example:
        >>> import pandas as pd
        >>> picture = {"concept": "neon", "kind": "style", "prompt": "a neon cat", "seed": 0}
        >>> scores = {"baseline": 0.75, "corrupted": 0.25, "restored": 0.5}
        >>> rows = [picture | {"role": role, "clip_score": scores[role]} for role in scores]
        >>> table = pd.DataFrame(rows).assign(noise="0", axis="cross-attention", start=0)
        >>> trace_effect(table)[["axis", "estimate"]]
                      axis  estimate
        0  cross-attention      0.25
        1          ceiling      0.50
    """
    import pandas as pd

    cubes = recovered(table)
    total = cubes.pop(TOTAL)
    nothing = np.zeros_like(total)
    lines: list[dict[str, Any]] = []
    for axis, values in cubes.items():
        evidence = carrier_evidence(
            values,
            ceiling=total if total.any() else None,
            placebo=nothing,
            width=1,
            level=level,
        )
        measured = estimates(axis, range(len(values)), values, level)
        lines += [line | more for line, more in zip(measured, evidence, strict=True)]
    lines += estimates(TOTAL, [pd.NA], total, level)
    baseline: Any = table.loc[table["role"] == "baseline", "clip_score"]
    return effects_table(
        lines,
        method=METHOD,
        concept=table["concept"].iloc[0],
        kind=table["kind"].iloc[0],
        width=1,
        baseline=baseline.mean(),
    )


def best_state(table: pd.DataFrame) -> BestState:
    """Find the state with the largest indirect effect, and judge whether it is the one place.

    It is if the noise does something, the state brings something back (p <= 0.05, corrected for all
    states), and that is at least half of the total effect.

    Args:
        table: The pictures table of one `causal_trace`.

    Returns:
        The state (`axis`, `position`); its indirect effect (`estimate`, `low`, `high`: 95 %) on
        seeds that did not choose it, where there are four seeds or more; its `share` of the total
        effect; the `p_value`; and the `reason` why it is not the one place, empty if it is.

    Raises:
        LocogenError: For a table of several concepts, missing rows, or scores that are not finite.

    Example:
        >>> import pandas as pd
        >>> picture = {"concept": "neon", "prompt": "a neon cat"}
        >>> scores = {"baseline": 0.75, "corrupted": 0.25, "restored": 0.625}
        >>> rows = [picture | {"role": role, "clip_score": scores[role]} for role in scores]
        >>> table = pd.DataFrame(rows).assign(noise="0", axis="cross-attention", start=0)
        >>> table = pd.concat([table.assign(seed=seed) for seed in range(4)])
        >>> state = best_state(table)
        >>> state.axis, state.position, state.share, state.reason
        ('cross-attention', 0, 0.75, '')
    """
    cubes = recovered(table)
    total = cubes.pop(TOTAL)
    places, values = _stacked(cubes)
    selection, held_out = _split(values)
    best = int(values[:, :, selection].mean((1, 2)).argmax())
    fresh = values[best][:, held_out]  # (prompts, held-out seeds)
    prompts = "fixed" if selection != held_out else None
    interval = stats.crossed_bootstrap(fresh[None], prompts=prompts)
    total_mean = float(total[:, :, held_out].mean())
    share = float(fresh.mean()) / total_mean if total_mean > 0 else float("nan")
    nothing = np.zeros_like(values[0])
    p_value = float(stats.any_effect(values, nothing, alpha=stats.ALPHA).p_value[best])

    reason = ""
    taken = stats.crossed_bootstrap(total)
    if not taken.low[0] > 0:
        reason = noise_text(total.mean(), taken.low[0], taken.high[0])
    elif not p_value <= stats.ALPHA:
        reason = "no state brings back more than chance would"
    elif share < MIN_SHARE:
        reason = f"the largest mean of all states is {percent(share)} of what the noise took"
    axis, position = places[best]
    return BestState(
        axis=axis,
        position=position,
        estimate=float(interval.estimate[0]),
        low=float(interval.low[0]),
        high=float(interval.high[0]),
        share=share,
        p_value=p_value,
        reason=reason,
    )


def layer_found(effects: pd.DataFrame) -> Window:
    """The cross-attention layer that brings back enough to be called the carrier, as in `carrier`.

    `effects`: from `trace_effect`. Without such a layer, a `Window` without start and the reason.
    """
    table: Any = effects
    lines = table[table["axis"] == LAYERS].set_index("position")
    if lines.empty:
        raise LocogenError(f"the trace has no {LAYERS} states: leave parts= as it is")
    start = int(lines["choose"].idxmax())
    best = lines.loc[start]
    total = table[table["axis"] == TOTAL]
    taken = total[["estimate", "low", "high"]].iloc[0]
    if not taken["low"] > 0:
        return Window(None, 1, noise_text(*taken))
    back = interval_text(best["fresh"], best["fresh_low"], best["fresh_high"])
    if not best["p_any"] <= stats.ALPHA or best["fresh"] <= 0:
        reason = "no layer brings back more than chance would"
        return Window(None, 1, f"{reason}; the largest mean, {back}, is that of layer {start}")
    is_ahead = bool(best["p_lead"] <= stats.ALPHA)
    if best["share"] < MIN_SHARE:
        share = f"brings back {back}, {percent(best['share'])} of what the noise took"
        name = "the best" if is_ahead else "the one with the largest mean"
        return Window(None, 1, f"{name}, layer {start}, {share}")
    if is_ahead:
        return Window(start, 1, "ahead of every other layer")
    return Window(start, 1, "its lead over other layers is not established")


def noise_text(taken: float, low: float, high: float) -> str:
    """Put in words what the noise does to the score.

    Args:
        taken: The total effect: how much of the score is lost.
        low: Lower end of its interval; NaN where there is none.
        high: Upper end.

    Returns:
        A clause: the noise takes something only where the interval is above zero, and moves the
        score the other way only where it is below.

    Example:
        >>> noise_text(0.4, 0.3, 0.5)
        'the noise takes 0.40 [0.30, 0.50] of the score'
        >>> noise_text(-0.4, -0.5, -0.3)
        'the noise takes nothing: it moves the score the other way, by 0.40 [0.30, 0.50]'
    """
    if low > 0:
        return f"the noise takes {interval_text(taken, low, high)} of the score"
    if high < 0:
        moved = interval_text(-taken, -high, -low)
        return f"the noise takes nothing: it moves the score the other way, by {moved}"
    bounds = ", without an interval" if math.isnan(low) else ""
    amount = interval_text(taken, low, high)
    return f"it is not clear that the noise changes the score ({amount}{bounds})"


def sides(table: pd.DataFrame) -> Sides | None:
    """Compare text encoder and denoiser: whose best state brings back more.

    Args:
        table: The pictures table of one `causal_trace`.

    Returns:
        The best state of each side in words (`text`, `denoiser`), how much more the first brings
        back (`lead`, `low`, `high`: 95 %, for these prompts), and the `side` that is ahead: None
        if neither is, or with the `reason` why none is named. None if only one side was traced.

    Raises:
        LocogenError: For a table of several concepts, missing rows, or scores that are not finite.

    Example:
        >>> import pandas as pd
        >>> names = ["role", "axis", "start", "clip_score"]
        >>> pictures = [("baseline", "", None, 0.75), ("corrupted", "", None, 0.25)]
        >>> pictures += [("restored", "text MLP", 5, 0.75), ("restored", "resnet", 2, 0.5)]
        >>> table = pd.DataFrame(pictures, columns=names).assign(concept="neon", noise="0")
        >>> table = pd.concat([table.assign(prompt="a cat", seed=seed) for seed in range(4)])
        >>> both = sides(table)
        >>> both.side, both.lead
        ('text encoder', 0.25)
    """
    cubes = recovered(table)
    del cubes[TOTAL]
    text = {axis: cube for axis, cube in cubes.items() if axis.startswith("text ")}
    denoiser = {axis: cube for axis, cube in cubes.items() if not axis.startswith("text ")}
    if not text or not denoiser:
        return None
    text_state, text_values = _best_held_out(text)
    denoiser_state, denoiser_values = _best_held_out(denoiser)
    gap = text_values - denoiser_values  # (prompts, held-out seeds)
    interval = stats.crossed_bootstrap(gap[None], prompts="fixed")

    reason = best_state(table).reason
    selection, held_out = _split(next(iter(cubes.values())))
    if selection == held_out and not reason:
        reason = "under four seeds cannot both choose the states and compare them"
    return Sides(
        text=text_state,
        denoiser=denoiser_state,
        lead=float(interval.estimate[0]),
        low=float(interval.low[0]),
        high=float(interval.high[0]),
        reason=reason,
    )


def _best_held_out(cubes: Mapping[str, Array]) -> tuple[str, Array]:
    """The best state on the selection seeds, in words, and its effects on the others."""
    places, values = _stacked(cubes)
    selection, held_out = _split(values)
    best = int(values[:, :, selection].mean((1, 2)).argmax())
    axis, position = places[best]
    return f"{axis}, layer {position}", values[best][:, held_out]  # (prompts, held-out seeds)


def _split(values: Array) -> tuple[list[int], list[int]]:
    """The seeds of (states, prompts, seeds) that select, and the held-out ones, by index."""
    selection, held_out = stats.split_seeds(range(values.shape[2]))
    return list(selection), list(held_out)


def _stacked(cubes: Mapping[str, Array]) -> tuple[list[tuple[str, int]], Array]:
    """All states of several parts in one array, and their (axis, position)."""
    places = [(axis, i) for axis, cube in cubes.items() for i in range(len(cube))]
    return places, np.concatenate(list(cubes.values()))  # (states, prompts, seeds)
