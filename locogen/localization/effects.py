"""What pictures say of every window, and which one carries the concept: a pictures table in, an effects table out.

Pictures: one row an image. Effects: one row an estimate, the same for every localizer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen import stats
from locogen.errors import LocogenError
from locogen.localization.raced import race_note, raced_effects
from locogen.plan import Window, sign_of

if TYPE_CHECKING:
    import pandas as pd

ALPHA = 0.05
MIN_SHARE = 0.5  # of the ceiling: less, and the window is not "the" carrier
Array = np.ndarray[Any, Any]


def effect(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """The effects table of a pictures table: what each window, insert and control does to the score.

    Estimates are paired with the baseline of the same prompt and seed and signed so that positive means "carries
    the concept". `axis`: layer (the window hears the target), timesteps (it hears it from `first_timestep` to
    `last_timestep` only), insert (only the window hears the prompt: what it restores of the ceiling's loss), content
    (how much of what should stay is lost; content_ceiling and content_placebo are the same for the controls), ceiling,
    placebo. Intervals: `stats.crossed_bootstrap`; under six
    prompts they speak for these prompts (`prompts` is "fixed"). On the layer axis beside them: `choose`, the estimate
    on the seeds used to choose a carrier, `fresh` with its interval on the others, `share` of the ceiling, and
    `p_any`, of "no more than the placebo", corrected for every window looked at; for the chosen window, its `lead`
    over the best non-overlapping rival with lower bound and p-value. A race's table: see `raced.raced_effects`.

    Raises `LocogenError` where rows are missing or scores are not finite.
    """
    import pandas as pd

    one = functools.partial(_concept_effects, level=level)
    search = functools.partial(raced_effects, whole=one) if "verdict" in table else one
    parts = [search(rows) for _, rows in table.groupby("concept", sort=False)]
    if not parts:
        raise LocogenError("the pictures table is empty: run localize first")
    return pd.concat(parts, ignore_index=True)


_SPAN = ["first_timestep", "last_timestep"]


def _cube(rows: Any, role: str, column: str, only: Mapping[str, int] | None = None) -> tuple[list[int], Array]:
    """Scores of one role as (windows, prompts, seeds), prompts in the table's order; one window where it has none."""
    part = rows[rows["role"] == role]
    for name, value in (only or {}).items():
        part = part[part[name] == value]
    starts = [int(s) for s in sorted(part["start"].dropna().unique())] or [-1]
    prompts, seeds = list(dict.fromkeys(rows["prompt"])), sorted(rows["seed"].unique())
    cube = np.full((len(starts), len(prompts), len(seeds)), np.nan)
    place = {name: {v: i for i, v in enumerate(vs)} for name, vs in (("w", starts), ("p", prompts), ("s", seeds))}
    for start, prompt, seed, value in part[["start", "prompt", "seed", column]].itertuples(index=False):
        cell = (0 if starts == [-1] else place["w"][int(start)], place["p"][prompt], place["s"][seed])
        if not np.isnan(cube[cell]):
            raise LocogenError(
                f"the table has the {role} of {prompt!r}, seed {seed} twice: give effect one run at a time"
            )
        cube[cell] = value
    if np.isnan(cube).any():
        what = "without a score" if len(part) == cube.size else "missing"
        raise LocogenError(f"of the {role} pictures some are {what}: run localize again on the same store")
    return starts, cube


def _concept_effects(rows: Any, level: float) -> pd.DataFrame:
    import pandas as pd

    name, kind = rows["concept"].iloc[0], rows["kind"].iloc[0]
    sign = sign_of(kind)
    widths = rows["width"].dropna().tolist()
    _, base = _cube(rows, "baseline", "clip_score")
    starts, window = _cube(rows, "window", "clip_score")

    def change(role: str) -> Array | None:
        """Effect of a role's rows, (windows, prompts, seeds); None where the sweep was made without them."""
        return sign * (_cube(rows, role, "clip_score")[1] - base) if (rows["role"] == role).any() else None

    effects = sign * (window - base)
    ceiling, placebo, insert = change("ceiling"), change("placebo"), change("insert")
    width = int(widths[0]) if widths else 1
    lines = _estimates("layer", starts, effects, level)
    judged = _judged(effects, ceiling, placebo, rows["seed"].nunique(), width, level, starts)
    lines = [{**line, **more} for line, more in zip(lines, judged, strict=True)]
    for axis, values in (("ceiling", ceiling), ("placebo", placebo)):
        lines += _estimates(axis, [pd.NA], values, level) if values is not None else []
    if insert is not None and ceiling is not None:  # what the window alone restores of the ceiling's loss
        lines += _estimates("insert", _cube(rows, "insert", "clip_score")[0], ceiling - insert, level)
    if kind != "fact":
        lines += _content_lost(rows, starts, level)
    timed = rows[rows["role"] == "timesteps"]
    for span in timed.reindex(columns=_SPAN).drop_duplicates().to_dict("records"):
        at, values = _cube(rows, "timesteps", "clip_score", span)
        lines += [line | span for line in _estimates("timesteps", at, sign * (values - base), level)]
    known = {"method": "locogen", "concept": name, "kind": kind, "width": width, "baseline": base.mean()}
    table = pd.DataFrame([{**known, **line} for line in lines])
    first = ["method", "concept", "axis", "position", "estimate", "low", "high", "n"]
    return table.reindex(columns=[*first, *(c for c in table.columns if c not in first)]).astype({"position": "Int64"})


def _content_lost(rows: Any, starts: Sequence[int], level: float) -> list[dict[str, Any]]:
    """How much of what should stay is lost at each window, and, to compare with, at the ceiling and the placebo.

    Of the prompts that say what should stay: one with an empty target does not.
    """
    rows = rows[rows.groupby("prompt")["content_score"].transform("count") > 0]
    if rows.empty:
        return []
    whole = _cube(rows, "baseline", "content_score")[1]
    lines = _estimates("content", starts, whole - _cube(rows, "window", "content_score")[1], level)
    for role in ("ceiling", "placebo"):
        if (rows["role"] == role).any():
            lost = whole - _cube(rows, role, "content_score")[1]
            lines += _estimates(f"content_{role}", [None], lost, level)
    return lines


def _estimates(axis: str, positions: Sequence[Any], values: Array, level: float) -> list[dict[str, Any]]:
    """One line a window of `values` (windows, prompts, seeds), with its interval."""
    found = stats.crossed_bootstrap(values, level=level)
    known = {"axis": axis, "n": values.shape[1] * values.shape[2], "prompts": found.prompts}
    names = ("position", "estimate", "low", "high")
    lines = zip(positions, found.estimate, found.low, found.high, strict=True)
    return [known | dict(zip(names, line, strict=True)) for line in lines]


def _judged(
    effects: Array,
    ceiling: Array | None,
    placebo: Array | None,
    seeds: int,
    width: int,
    level: float,
    starts: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """What a carrier is decided by, for each window: choice, fresh estimate, lead, share, and the placebo test.

    Some seeds choose, the others are fresh (`stats.split_seeds`). Both share their prompts, so what is said of the
    fresh ones takes the prompts as fixed (see `stats.simultaneous_lead`); where all are used for both, the lead is
    corrected for the choice instead.
    """
    picked, kept = map(list, stats.split_seeds(range(seeds)))
    split = picked != kept
    fresh = effects[:, :, kept]
    held = "fixed" if split else None
    interval = stats.crossed_bootstrap(fresh, level=level, prompts=held)
    choice = effects[:, :, picked].mean((1, 2))
    p_any = np.full(len(effects), np.nan)
    if placebo is not None:  # a paraphrase may even raise the score: the effect must also beat none at all
        against = (placebo, np.zeros_like(placebo))
        p_any = np.max([stats.any_effect(effects, p, alpha=ALPHA).p_value for p in against], axis=0)
    lines, places = [], starts or range(len(effects))
    for w in range(len(effects)):
        line = {"choose": choice[w], "fresh": interval.estimate[w], "p_any": p_any[w]}
        line |= {"fresh_low": interval.low[w], "fresh_high": interval.high[w]}
        line["share"] = fresh[w].mean() / ceiling[:, :, kept].mean() if ceiling is not None else np.nan
        rivals = [v for v, at in enumerate(places) if abs(at - places[w]) >= width]
        if w == int(choice.argmax()) and rivals:
            options: dict[str, Any] = dict(apart=width, chosen_here=not split, alpha=ALPHA, prompts=held)
            lead = stats.simultaneous_lead(fresh, w, rivals, **options)
            line |= {"lead": lead.lead, "lead_low": lead.low, "p_lead": lead.p_value}
        else:  # where every window overlaps the best one, there is no lead to have
            line |= dict.fromkeys(("lead", "lead_low", "p_lead"), np.nan)
        lines.append(line)
    return lines


# --- carrier -------------------------------------------------------------------------------------


def carrier(effects: pd.DataFrame, *, min_share: float = MIN_SHARE) -> Window:
    """The window that carries the concept, or a `Window` without start whose reason says why there is none.

    Chosen by the largest `choose`; accepted where the ceiling has an effect, the window does more than the placebo
    (`p_any` <= 0.05), and its fresh effect is at least `min_share` of the ceiling's. A reason also stands beside a
    window whose lead over its best non-overlapping rival is not established. Raises `LocogenError` for an effects
    table of several concepts: take one at a time.
    """
    names = list(dict.fromkeys(effects["concept"]))
    if len(names) != 1:
        raise LocogenError(f"the effects are of {len(names)} concepts: select one, effects[effects.concept == name]")
    layer: Any = effects.query("axis == 'layer'").set_index("position")
    found = _accepted(effects, layer, min_share)
    if "verdict" not in layer:
        return found
    return Window(found.start, found.width, f"{found.reason}; {race_note(layer)}")


def _accepted(effects: Any, layer: Any, min_share: float) -> Window:
    """The window with the largest choice, or the winner of a race, where it passes."""
    width = int(layer["width"].iloc[0])
    start = int((layer["choose"] if "verdict" not in layer else layer["verdict"] == "chosen").idxmax())
    best = {name: float(layer.at[start, name]) for name in ("fresh", "share", "p_lead", "p_any")}
    elsewhere = _candidates(layer["choose"].sort_values(ascending=False).index.astype(int).tolist(), width)
    axes = set(effects["axis"])
    if "placebo" in axes and np.isnan(best["p_any"]):
        return Window(None, width, "one seed and few prompts cannot tell: use more of either")
    if "ceiling" in axes and effects.query("axis == 'ceiling'")["low"].iloc[0] <= 0:
        return Window(None, width, "the target hardly changes the score, even in all layers: choose another")
    if best["p_any"] > ALPHA:
        return Window(None, width, f"no effect beyond the placebo's; {elsewhere}")
    if best["fresh"] <= 0:
        return Window(None, width, f"no effect on fresh seeds; {elsewhere}")
    if best["share"] < min_share:
        return Window(None, width, f"the best window has {best['share']:.0%} of the ceiling's effect; {elsewhere}")
    if best["p_lead"] <= ALPHA:
        rivals = "every other place" if "verdict" not in layer else "its best rival"  # a race follows only that one
        return Window(start, width, f"ahead of {rivals}")
    return Window(start, width, f"its lead over other places is not established; {elsewhere}")


def _candidates(ranked: Sequence[int], width: int) -> str:
    """Where to look instead: a wider window when the best places touch, two places when they do not."""
    first = ranked[0]
    second = next((s for s in ranked if abs(s - first) >= width), None)
    if second is None:
        return f"look at layer {first} with another width"
    low, high = sorted((first, second))
    if high - low <= width + 1:
        return f"try a wider window, {low}-{high + width - 1}"
    return f"try two places together, {low}-{low + width - 1} and {high}-{high + width - 1}"
