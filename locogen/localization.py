"""LocoGen: generate every window of layers, score it, and say which one carries the concept.

Two tables: pictures (one row an image) and effects (one row an estimate, the same for every localizer).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen import stats
from locogen.catalog import usual_settings
from locogen.errors import LocogenError
from locogen.layers import find_layers
from locogen.plan import Concept, Pooled, Window, distinct_seeds, sign_of, sweep
from locogen.runs import Run, generate

if TYPE_CHECKING:
    import pandas as pd

    from locogen.score import Scorer

ALPHA = 0.05
MIN_SHARE = 0.5  # of the ceiling: less, and the window is not "the" carrier
Array = np.ndarray[Any, Any]


def localize(
    pipe: Any,
    concept: Concept | Sequence[Concept],
    *,
    window: int | None = 2,
    seeds: Iterable[int] = range(4),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    scorer: Scorer | str | None = None,
    controls: bool = True,
    timesteps: Iterable[tuple[int, int]] = (),
    pooled: Pooled = "keep",
    store: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """LocoGen (Basu et al. 2024, section 4) over every window, with the rows that give a number its meaning.

    For each prompt pair and seed: the baseline, each window hearing the target, and with `controls` the ceiling,
    the placebo and the insert sweep (see `plan.sweep`). Every picture is scored against the concept's text, and
    against what should stay (`content_score`; NaN for facts). `timesteps`, `pooled`: see `plan.sweep`; in families that
    hear text by a pooled vector too, "keep" asks for the layers alone, and the ceiling is less than the target's own
    run. `scorer`: a scorer or its name. None for `window`,
    `num_inference_steps`, `guidance_scale` or `scorer` takes the catalog's for the model. `store`: a folder; what it
    holds is not made again. Returns a `Run` whose table is the pictures table. Raises `LocogenError` for a window
    larger than the model, no or repeated seeds, and as `generate` does.
    """
    concepts = _concepts(concept)
    drawn = distinct_seeds(seeds)
    count = len(find_layers(pipe))
    usual = usual_settings(_source(pipe))
    width = usual["window"] if window is None else window
    asked: dict[str, Any] = dict(seeds=drawn, controls=controls, timesteps=tuple(timesteps), pooled=pooled)
    plans = [sweep(c, n_layers=count, window=width, **asked) for c in concepts]
    judge = _scorer(scorer, pipe)  # before the pictures: what is wrong with it should not cost a sweep
    run = generate(
        pipe,
        [row for plan in plans for row in plan],
        store=store,
        num_inference_steps=usual["num_inference_steps"] if num_inference_steps is None else num_inference_steps,
        guidance_scale=usual["guidance_scale"] if guidance_scale is None else guidance_scale,
        batch_size=batch_size,
        progress=progress,
    )
    table = run.table.assign(**_scored_against(concepts, plans))
    scores = _scores(run, table, judge)
    return run.with_table(_ordered(table.assign(**scores)), window=width, n_layers=count, **judge.settings)


def _concepts(given: Any) -> list[Concept]:
    concepts: list[Any] = [given] if isinstance(given, (Concept, str)) else list(given)
    strangers = [c for c in concepts if not isinstance(c, Concept)]
    if strangers:
        raise LocogenError(f"{strangers[0]!r} is no Concept: take loco.concept({strangers[0]!r}), or make one")
    names = [c.name for c in concepts]
    if not concepts or len(set(names)) < len(names):
        raise LocogenError(f"localize was given the concepts {names}: give at least one, and no name twice")
    return concepts


def _scorer(chosen: Scorer | str | None, pipe: Any) -> Scorer:
    from locogen.score import default_scorer, scorer

    if chosen is None:
        chosen = default_scorer(_source(pipe))
    return scorer(chosen, device=pipe.device.type) if isinstance(chosen, str) else chosen


def _source(pipe: Any) -> str:
    """The folder or hub id that the model was loaded from; empty for one that was made in place."""
    return str(getattr(pipe.config, "_name_or_path", "") or "")


def _scored_against(concepts: Sequence[Concept], plans: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in ("concept", "kind", "pair", "text", "content")}
    for concept, plan in zip(concepts, plans, strict=True):
        pairs = {pair.prompt: (i, pair) for i, pair in enumerate(concept.pairs)}
        for row in plan:
            index, pair = pairs[row.prompt]
            values = (concept.name, concept.kind, index, concept.scored_text(pair), concept.content_text(pair))
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    return columns


def _scores(run: Run, table: pd.DataFrame, judge: Scorer, part: int = 256) -> dict[str, Array]:
    """Score in parts, so that not all pictures are held at once."""
    silent = table["content"].isna().to_numpy()
    texts, contents = list(table["text"]), list(table["content"].fillna(""))
    halves: list[list[Array]] = []
    for start in range(0, len(run), part):
        rows = slice(start, start + part)
        halves.append(judge(run.pictures[rows], texts[rows], contents[rows]))
    score, content = (np.concatenate(half) for half in zip(*halves, strict=True))
    return {"clip_score": score, "content_score": np.where(silent, np.nan, content)}


def _ordered(table: Any) -> Any:
    first = ["concept", "kind", "role", "prompt", "target", "text", "start", "width", "seed", "edit", "image"]
    first += ["clip_score", "content_score"]
    return table[[*first, *(c for c in table.columns if c not in first)]]


# --- effects -------------------------------------------------------------------------------------


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
    over the best non-overlapping rival with lower bound and p-value.

    Raises `LocogenError` where rows are missing or scores are not finite.
    """
    import pandas as pd

    parts = [_concept_effects(rows, level) for _, rows in table.groupby("concept", sort=False)]
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
    judged = _judged(effects, ceiling, placebo, rows["seed"].nunique(), width, level)
    lines = [{**line, **more} for line, more in zip(lines, judged, strict=True)]
    for axis, values in (("ceiling", ceiling), ("placebo", placebo)):
        lines += _estimates(axis, [pd.NA], values, level) if values is not None else []
    if insert is not None and ceiling is not None:  # what the window alone restores of the ceiling's loss
        lines += _estimates("insert", starts, ceiling - insert, level)
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
    """How much of what should stay is lost at each window, and, to compare with, at the ceiling and the placebo."""
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
    n = values.shape[1] * values.shape[2]
    return [
        {
            "axis": axis,
            "position": p,
            "estimate": e,
            "low": low,
            "high": high,
            "n": n,
            "prompts": found.prompts,
        }
        for p, e, low, high in zip(positions, found.estimate, found.low, found.high, strict=True)
    ]


def _judged(
    effects: Array,
    ceiling: Array | None,
    placebo: Array | None,
    seeds: int,
    width: int,
    level: float,
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
    lines = []
    for w in range(len(effects)):
        line = {"choose": choice[w], "fresh": interval.estimate[w], "p_any": p_any[w]}
        line |= {"fresh_low": interval.low[w], "fresh_high": interval.high[w]}
        line["share"] = fresh[w].mean() / ceiling[:, :, kept].mean() if ceiling is not None else np.nan
        if w == int(choice.argmax()) and any(abs(w - v) >= width for v in range(len(effects))):
            lead = stats.simultaneous_lead(fresh, w, apart=width, chosen_here=not split, alpha=ALPHA, prompts=held)
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
    width = int(layer["width"].iloc[0])
    start = int(layer["choose"].idxmax())
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
        return Window(start, width, "ahead of every other place")
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
