"""What pictures say about every window, and which one carries the concept.

A pictures table (one row an image) goes in, an effects table (one row an estimate) comes out. The
effects table is the same for every localizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen import stats
from locogen.errors import LocogenError
from locogen.plan import Window, sign_of

if TYPE_CHECKING:
    import pandas as pd

MIN_SHARE = 0.5  # of the ceiling's effect: with less, the window is not "the" carrier
FIRST_COLUMNS = ("method", "concept", "axis", "position", "estimate", "low", "high", "n")
SPAN = ("first_timestep", "last_timestep")
Array = np.ndarray[Any, Any]
Line = dict[str, Any]  # one row of an effects table


def effect(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Compute the effects table: what each window, insert and control does to the score.

    Estimates are paired with the baseline of the same prompt and seed, and signed so that positive
    means "carries the concept". A race's table is treated as `raced_effects` says.

    The column `axis` says what a row is about:

    - "layer": the window gets the target prompt.
    - "timesteps": it gets it from `first_timestep` to `last_timestep` only.
    - "insert": only the window gets the prompt; what it restores of the ceiling's loss.
    - "content": how much of what should stay is lost; "content_ceiling" and "content_placebo" are
      the same for the controls.
    - "ceiling": every layer gets the target. "placebo": every layer gets a paraphrase.

    Args:
        table: The pictures table of `localize`, of one concept or several.
        level: Coverage of the intervals. With fewer than six prompts they speak for these prompts
            only (column `prompts` is "fixed").

    Returns:
        One row an estimate: method, concept, axis, position (first layer), estimate, low, high, n
        (pictures) and more. On the axis "layer" also: `choose`, the estimate on the seeds used to
        choose a carrier; `fresh` with its interval, on the held-out seeds; `share` of the ceiling;
        `p_any`, of "no more than the placebo", corrected for all windows; and for the best window
        `lead`, `lead_low`, `p_lead` over the best rival that does not overlap it.

    Raises:
        LocogenError: If rows are missing or twice, or scores are not finite.

    Example:
        >>> import pandas as pd
        >>> pair = {"concept": "neon", "kind": "style", "prompt": "a neon cat", "seed": 0}
        >>> base = pair | {"role": "baseline", "start": None, "width": None, "clip_score": 0.6}
        >>> window = pair | {"role": "window", "start": 3, "width": 2, "clip_score": 0.2}
        >>> table = pd.DataFrame([base, window]).assign(content_score=0.5)
        >>> effect(table)[["concept", "axis", "position", "estimate"]]
          concept     axis  position  estimate
        0    neon    layer         3       0.4
        1    neon  content         3       0.0
    """
    import pandas as pd

    measure = functools.partial(_concept_effects, level=level)
    if "verdict" in table:
        measure = functools.partial(raced_effects, whole=measure)
    parts = [measure(rows) for _, rows in table.groupby("concept", sort=False)]
    if not parts:
        raise LocogenError("the pictures table is empty: run localize first")
    return pd.concat(parts, ignore_index=True)


class Scores:
    """The scores of one concept's pictures by role, as arrays of (windows, prompts, seeds)."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.prompts = list(dict.fromkeys(rows["prompt"]))
        self.seeds = sorted(rows["seed"].unique())
        self.sign = sign_of(rows["kind"].iloc[0])
        self.baseline = self.of("baseline")

    def has(self, role: str) -> bool:
        """Whether there are pictures of this role."""
        return bool((self.rows["role"] == role).any())

    def starts(self, role: str) -> list[int]:
        """First layers of the role's windows; empty for baseline and controls."""
        places = self.rows.loc[self.rows["role"] == role, "start"]
        return sorted(int(start) for start in places.dropna().unique())

    def of(
        self,
        role: str,
        column: str = "clip_score",
        only: Mapping[str, int] | None = None,
    ) -> Array:
        """Scores of one role, (windows, prompts, seeds); one "window" for baseline and controls.

        `only`: further conditions, column → value.
        """
        part = self.rows[self.rows["role"] == role]
        for name, value in (only or {}).items():
            part = part[part[name] == value]
        starts = sorted(int(start) for start in part["start"].dropna().unique())
        # A placeholder in the place of the first layer, where a role has none.
        part = part.assign(start=part["start"].fillna(-1).astype(int))
        levels = {"start": starts or [-1], "prompt": self.prompts, "seed": self.seeds}
        repeated = part[part.duplicated(list(levels))]
        if len(repeated):
            prompt, seed = repeated[["prompt", "seed"]].iloc[0]
            raise LocogenError(
                f"the table has the {role} of {prompt!r}, seed {seed} twice: "
                "give effect one run at a time"
            )
        values = stats.cube(part, column, levels)
        if np.isnan(values).any():
            fault = "without a score" if len(part) == values.size else "missing"
            raise LocogenError(
                f"of the {role} pictures some are {fault}: run localize again on the same store"
            )
        return values

    def effect_of(self, role: str, only: Mapping[str, int] | None = None) -> Array:
        """What a role does to the score, positive if it carries, (windows, prompts, seeds)."""
        return self.sign * (self.of(role, only=only) - self.baseline)

    def content_lost(self, role: str) -> Array:
        """How much of the score of what should stay is lost, (windows, prompts, seeds)."""
        return self.of("baseline", "content_score") - self.of(role, "content_score")


def _concept_effects(rows: Any, level: float) -> pd.DataFrame:
    scores = Scores(rows)
    starts = scores.starts("window")
    widths = rows["width"].dropna()
    width = int(widths.iloc[0]) if len(widths) else 1

    effects = scores.effect_of("window")
    # Sweeps without controls have neither ceiling nor placebo.
    ceiling = scores.effect_of("ceiling") if scores.has("ceiling") else None
    placebo = scores.effect_of("placebo") if scores.has("placebo") else None
    evidence = carrier_evidence(
        effects, ceiling=ceiling, placebo=placebo, width=width, level=level, starts=starts
    )
    lines = [
        line | more
        for line, more in zip(estimates("layer", starts, effects, level), evidence, strict=True)
    ]
    lines += _controls(scores, ceiling, placebo, level)
    kind = rows["kind"].iloc[0]
    if kind != "fact":  # a fact replaces its content: nothing should stay
        lines += _content(rows, level)
    lines += _over_time(scores, level)
    return effects_table(
        lines,
        method="locogen",
        concept=rows["concept"].iloc[0],
        kind=kind,
        width=width,
        baseline=scores.baseline.mean(),
    )


def _controls(
    scores: Scores, ceiling: Array | None, placebo: Array | None, level: float
) -> list[Line]:
    """Lines of the ceiling, the placebo and the inserts, those that the sweep has."""
    import pandas as pd

    lines = []
    if ceiling is not None:
        lines += estimates("ceiling", [pd.NA], ceiling, level)
    if placebo is not None:
        lines += estimates("placebo", [pd.NA], placebo, level)
    if ceiling is not None and scores.has("insert"):
        # What the window alone restores of the ceiling's loss.
        restored = ceiling - scores.effect_of("insert")
        lines += estimates("insert", scores.starts("insert"), restored, level)
    return lines


def _content(rows: Any, level: float) -> list[Line]:
    """How much of what should stay is lost at each window and, for comparison, at the controls."""
    # A prompt whose target is empty has no text that should stay.
    with_content = rows[rows.groupby("prompt")["content_score"].transform("count") > 0]
    if with_content.empty:
        return []
    scores = Scores(with_content)
    lines = estimates("content", scores.starts("window"), scores.content_lost("window"), level)
    for role in ("ceiling", "placebo"):
        if scores.has(role):
            lines += estimates(f"content_{role}", [None], scores.content_lost(role), level)
    return lines


def _over_time(scores: Scores, level: float) -> list[Line]:
    """Effects of the windows that get the target during a span of denoising steps only."""
    timed = scores.rows[scores.rows["role"] == "timesteps"]
    lines = []
    for span in timed.reindex(columns=SPAN).drop_duplicates().to_dict("records"):
        in_span = timed[(timed[SPAN[0]] == span[SPAN[0]]) & (timed[SPAN[1]] == span[SPAN[1]])]
        starts = sorted(int(start) for start in in_span["start"].dropna().unique())
        changes = scores.effect_of("timesteps", span)
        lines += [line | span for line in estimates("timesteps", starts, changes, level)]
    return lines


# --- lines of an effects table, for every localizer ----------------------------------------------


def estimates(axis: str, positions: Sequence[Any], values: Array, level: float) -> list[Line]:
    """One line a window of `values` (windows, prompts, seeds), with its interval."""
    intervals = stats.crossed_bootstrap(values, level=level)
    count = values.shape[1] * values.shape[2]
    lines = []
    for i, position in enumerate(positions):
        line = {"axis": axis, "n": count, "prompts": intervals.prompts, "position": position}
        line["estimate"] = intervals.estimate[i]
        line["low"] = intervals.low[i]
        line["high"] = intervals.high[i]
        lines.append(line)
    return lines


def effects_table(
    lines: Sequence[Line],
    *,
    method: str,
    concept: str,
    kind: str,
    width: int,
    baseline: float | None = None,
) -> pd.DataFrame:
    """The lines of one concept as an effects table; columns of all methods come first."""
    import pandas as pd

    common = {"method": method, "concept": concept, "kind": kind, "width": width}
    if baseline is not None:
        common["baseline"] = baseline
    table = pd.DataFrame([common | line for line in lines])
    others = [column for column in table.columns if column not in FIRST_COLUMNS]
    return table.reindex(columns=[*FIRST_COLUMNS, *others]).astype({"position": "Int64"})


def carrier_evidence(
    effects: Array,
    *,
    ceiling: Array | None,
    placebo: Array | None,
    width: int,
    level: float,
    starts: Sequence[int] | None = None,
) -> list[Line]:
    """What a carrier is decided by, for each window.

    Args:
        effects: Effects of the windows, (windows, prompts, seeds).
        ceiling: Effect of every layer together, (1, prompts, seeds); None: not measured.
        placebo: What no carrier would do, (1, prompts, seeds); None: not measured.
        width: Layers in a window.
        level: Coverage of the held-out intervals.
        starts: First layer of each window; None: 0, 1, 2, ...

    Returns:
        One dictionary a window: choose, fresh (with fresh_low, fresh_high), p_any, share, and for
        the best window lead, lead_low, p_lead (NaN for others, and where every window overlaps it).
    """
    # Some seeds select the window, the others are held out for its estimate. Both share their
    # prompts, so the held-out estimate takes prompts as fixed (see `stats.simultaneous_lead`). With
    # too few seeds to split, all serve for both, and the lead is corrected for the selection.
    selection, held_out = (list(part) for part in stats.split_seeds(range(effects.shape[2])))
    split = selection != held_out
    prompts = "fixed" if split else None
    fresh = effects[:, :, held_out]  # (windows, prompts, held-out seeds)
    choice = effects[:, :, selection].mean((1, 2))  # (windows,)
    intervals = stats.crossed_bootstrap(fresh, level=level, prompts=prompts)
    p_any = _p_any(effects, placebo)
    ceiling_effect = np.nan if ceiling is None else ceiling[:, :, held_out].mean()

    lines = []
    for window in range(len(effects)):
        line = {
            "choose": choice[window],
            "fresh": intervals.estimate[window],
            "p_any": p_any[window],
        }
        line["fresh_low"] = intervals.low[window]
        line["fresh_high"] = intervals.high[window]
        line["share"] = fresh[window].mean() / ceiling_effect
        line |= dict.fromkeys(("lead", "lead_low", "p_lead"), np.nan)
        lines.append(line)

    best = int(choice.argmax())
    places = range(len(effects)) if starts is None else starts
    rivals = [i for i, start in enumerate(places) if abs(start - places[best]) >= width]
    if rivals:
        lead = stats.simultaneous_lead(
            fresh,
            best,
            rivals,
            apart=width,
            chosen_here=not split,
            alpha=stats.ALPHA,
            prompts=prompts,
        )
        lines[best] |= {"lead": lead.lead, "lead_low": lead.low, "p_lead": lead.p_value}
    return lines


def _p_any(effects: Array, placebo: Array | None) -> Array:
    """p-values of "no more than the placebo", corrected for all windows, (windows,)."""
    if placebo is None:
        return np.full(len(effects), np.nan)
    # A paraphrase may even raise the score: the effect must also be larger than none at all.
    controls = (placebo, np.zeros_like(placebo))
    p_values = [
        stats.any_effect(effects, control, alpha=stats.ALPHA).p_value for control in controls
    ]
    return np.max(p_values, axis=0)


# --- races ---------------------------------------------------------------------------------------


def raced_effects(rows: Any, whole: Callable[[Any], pd.DataFrame]) -> pd.DataFrame:
    """The effects table of one concept's race.

    The winner and its rival have all pictures and are judged as in an exhaustive search. Of the
    other windows there is the `estimate` on the `n` pairs they had, without an interval: which
    pairs they had depends on how they did. Every window says how it left the race (`verdict`),
    after how many pairs (`looked`), and `sure`: the share of any other window's effect that the
    winner's reaches at least, with 95 % confidence (`racing.Race.sure`).

    Args:
        rows: The concept's pictures table.
        whole: Gives the effects table of a pictures table in which nothing is missing.

    Returns:
        The effects table, windows in the order of the layers.
    """
    import pandas as pd

    pairs = int((rows["role"] == "baseline").sum())
    swept = rows[rows["role"] == "window"]
    sizes = swept.groupby("start").size()
    finalists = sizes.index[sizes == pairs]  # starts of the windows that have every picture
    partial = rows["role"].isin(["window", "insert"]) & ~rows["start"].isin(finalists)
    table = whole(rows[~partial])

    # The finalists were picked among all windows by some of the same pictures. Bonferroni's
    # correction holds however they were picked.
    on_layers = table["axis"] == "layer"
    table.loc[on_layers, "p_any"] = (table.loc[on_layers, "p_any"] * len(sizes)).clip(upper=1)
    others = swept[~swept["start"].isin(finalists)]
    if len(others):
        dropped = _partly_measured(rows, others, table[on_layers].iloc[0])
        layers = pd.concat([table[on_layers], dropped], ignore_index=True)
        layers = layers.iloc[layers["position"].argsort(kind="stable")]
        table = pd.concat([layers, table[~on_layers]], ignore_index=True)

    columns = ["verdict", "looked", "sure"]
    verdicts: Any = swept.drop_duplicates("start").set_index("start")[columns]
    table = table.join(verdicts, on="position")
    table.loc[table["axis"] != "layer", columns] = None
    return table


def _partly_measured(rows: Any, swept: Any, finalist: Any) -> pd.DataFrame:
    """Lines of the windows that left the race: their paired estimate on the pairs they had."""
    import pandas as pd

    baseline = rows[rows["role"] == "baseline"].set_index(["prompt", "seed"])["clip_score"]
    common = finalist[["method", "concept", "axis", "kind", "width", "baseline"]].to_dict()
    lines = []
    for start, part in swept.groupby("start"):
        score = part.set_index(["prompt", "seed"])["clip_score"]
        change = sign_of(finalist["kind"]) * (score - baseline.loc[score.index])
        estimate = float(change.mean())
        line = {"position": start, "estimate": estimate, "choose": estimate, "n": len(part)}
        lines.append(common | line)
    return pd.DataFrame(lines).astype({"position": "Int64"})


def race_note(layers: pd.DataFrame) -> str:
    """What a race did not look at and how sure it is, in words, from its layer axis."""
    counts: Any = layers["n"]
    pairs = int(counts.max())
    partial = counts[counts < pairs].astype(int)
    notes = []
    if len(partial):
        low, high = partial.min(), partial.max()
        amount = f"{low}" if low == high else f"{low} to {high}"
        notes.append(
            f"{len(partial)} of {len(layers)} windows seen on {amount} of {pairs} pairs only"
        )
    verdicts = layers["verdict"].tolist()
    if "dropped" in verdicts:
        notes.append(f"{verdicts.count('dropped')} cannot be the best")
    if "cut" in verdicts:
        notes.append(f"{verdicts.count('cut')} left out for the budget's sake")
    sure = float(layers["sure"].iloc[0])
    if sure > 0:
        percent = int(100 * sure)
        confidence = f"{1 - stats.ALPHA:.0%}"
        notes.append(f"at least {percent}% of any other window's effect (confidence {confidence})")
    else:
        notes.append("too few pairs to say how near the best it is")
    return "race: " + ", ".join(notes)


# --- carrier -------------------------------------------------------------------------------------


def carrier(effects: pd.DataFrame, *, min_share: float = MIN_SHARE) -> Window:
    """Decide which window carries the concept, if one does.

    The window with the largest estimate on the selection seeds (`choose`) is accepted if the
    ceiling has an effect, the window does more than the placebo (`p_any` <= 0.05), and its effect
    on the held-out seeds is at least `min_share` of the ceiling's.

    Args:
        effects: The effects table of one concept, from `effect`.
        min_share: Smallest share of the ceiling's effect, 0 to 1.

    Returns:
        The window; its `reason` says whether its lead over other places is established. If no
        window is accepted, a `Window` without start whose reason says why, and where to look
        instead.

    Raises:
        LocogenError: If the table has several concepts.

    Example:
        >>> import pandas as pd
        >>> line = {"concept": "neon", "axis": "layer", "width": 2, "p_any": 0.01, "p_lead": 0.01}
        >>> best = line | {"position": 5, "choose": 0.3, "fresh": 0.3, "share": 0.9}
        >>> other = line | {"position": 9, "choose": 0.1, "fresh": 0.1, "share": 0.3}
        >>> carrier(pd.DataFrame([best, other]))
        Window(start=5, width=2, reason='ahead of every other place')
    """
    names = list(dict.fromkeys(effects["concept"]))
    if len(names) != 1:
        raise LocogenError(
            f"the effects are of {len(names)} concepts: "
            "select one, effects[effects.concept == name]"
        )
    layers: Any = effects.query("axis == 'layer'").set_index("position")
    window = _accepted(effects, layers, min_share)
    if "verdict" not in layers:
        return window
    return Window(window.start, window.width, f"{window.reason}; {race_note(layers)}")


def _accepted(effects: Any, layers: Any, min_share: float) -> Window:
    """The window with the largest choice, or the winner of a race, where it passes."""
    raced = "verdict" in layers
    winner = layers["verdict"] == "chosen" if raced else layers["choose"]
    start = int(winner.idxmax())
    width = int(layers["width"].iloc[0])
    ranked = layers["choose"].sort_values(ascending=False).index.astype(int).tolist()
    elsewhere = _elsewhere(ranked, width)

    best = layers.loc[start]
    objection = _objection(effects, best, min_share, elsewhere)
    if objection:
        return Window(None, width, objection)
    if best["p_lead"] <= stats.ALPHA:
        # A race follows only one rival to the end.
        rivals = "its best rival" if raced else "every other place"
        return Window(start, width, f"ahead of {rivals}")
    return Window(start, width, f"its lead over other places is not established; {elsewhere}")


def _objection(effects: Any, best: Any, min_share: float, elsewhere: str) -> str:
    """Why the best window is not the carrier; empty where it is."""
    axes = set(effects["axis"])
    if "placebo" in axes and np.isnan(best["p_any"]):
        return "one seed and few prompts cannot tell: use more of either"
    if "ceiling" in axes and effects.query("axis == 'ceiling'")["low"].iloc[0] <= 0:
        return "the target hardly changes the score, even in all layers: choose another"
    if best["p_any"] > stats.ALPHA:
        return f"no effect beyond the placebo's; {elsewhere}"
    if best["fresh"] <= 0:
        return f"no effect on fresh seeds; {elsewhere}"
    if best["share"] < min_share:
        return f"the best window has {best['share']:.0%} of the ceiling's effect; {elsewhere}"
    return ""


def _elsewhere(ranked: Sequence[int], width: int) -> str:
    """Where to look instead: a wider window if the best places touch, two places if they do not."""
    first = ranked[0]
    apart = [start for start in ranked if abs(start - first) >= width]
    if not apart:
        return f"look at layer {first} with another width"
    low, high = sorted((first, apart[0]))
    if high - low <= width + 1:
        wider = Window(low, high - low + width)
        return f"try a wider window, {wider.label}"
    return f"try two places together, {Window(low, width).label} and {Window(high, width).label}"
