"""What pictures say about every window, and which one carries the concept.

A pictures table (one row an image) goes in, an effects table (one row an estimate) comes out. The
effects table is the same for every localizer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from locogen import stats
from locogen.errors import LocogenError
from locogen.localization.spread import seeds_needed
from locogen.localization.verdict import MIN_SHARE, TELLS_APART, judge, possible_change
from locogen.markup import percent
from locogen.plan import Verdict, sign_of

if TYPE_CHECKING:
    import pandas as pd

FIRST_COLUMNS = ("method", "concept", "axis", "position", "estimate", "low", "high", "n")
SPAN = ("first_timestep", "last_timestep")
Array = np.ndarray[Any, Any]
Line = dict[str, Any]  # one row of an effects table


def score_used(rows: Any) -> str:
    """The score that a concept's effects are measured by, where none is asked for.

    "probability" where every picture has one, because it is a scale: "clip_score" elsewhere.
    """
    if "probability" in rows and len(rows) and rows["probability"].notna().all():
        return "probability"
    return "clip_score"


def effect(
    table: pd.DataFrame,
    *,
    level: float = 0.95,
    score: Literal["probability", "clip_score"] | None = None,
) -> pd.DataFrame:
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
        score: "probability" (of the concept among its neighbors) or "clip_score" (raw cosine);
            None: the probability of a concept whose every picture has one, else the cosine.

    Returns:
        One row an estimate: method, concept, axis, position (first layer), estimate, low, high, n
        (pictures), `n_seeds` (of each prompt), `score` (which one it is of), `cosine` with
        `cosine_low` and `cosine_high` (the same estimate on the raw cosine) and more:

        - on "layer" and "insert": `share` of the ceiling with its interval; `p_any`, of "no effect,
          or no more than the placebo's", corrected for all windows; `seeds`, about how many tell
          whether the share is under or over a half, where it is open;
        - on "layer": `choose`, what a carrier is chosen by; `fresh` with its interval, the same:
          all seeds choose, and tests are corrected for it; and for the best window `lead`,
          `lead_low`, `p_lead` over the best rival that does not overlap it;
        - on "content": `beyond` with its interval, what is lost beyond the loss at the ceiling or
          the placebo, as a share of the baseline's content score.

    Raises:
        LocogenError: If rows are missing or twice, scores are not finite, or there is no score of
            that name.

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

    is_partial = "verdict" in table
    measure = functools.partial(_concept_effects, level=level)
    parts = []
    for name, rows in table.groupby("concept", sort=False):
        column = _checked_score(rows, str(name), score)
        by_score = functools.partial(measure, column=column)
        parts.append(partial_effects(rows, by_score, column) if is_partial else by_score(rows))
    if not parts:
        raise LocogenError("the pictures table is empty: run localize first")
    return pd.concat(parts, ignore_index=True)


def _checked_score(rows: Any, concept: str, score: str | None) -> str:
    """The column to measure by."""
    if score is None:
        return score_used(rows)
    if score not in ("probability", "clip_score"):
        raise LocogenError(f"score is {score!r}: use 'probability', 'clip_score' or None")
    if score not in rows or rows[score].isna().all():
        raise LocogenError(
            f"the pictures of {concept!r} have no {score}: it takes a concept that names neighbors"
        )
    return score


class Scores:
    """The scores of one concept's pictures by role, as arrays of (windows, prompts, seeds).

    `column`: the score that effects are measured by.
    """

    def __init__(self, rows: Any, column: str = "clip_score") -> None:
        self.rows = rows
        self.column = column
        self._cubes: dict[tuple[Any, ...], Array] = {}  # what was asked for already
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
        column: str | None = None,
        only: Mapping[str, int] | None = None,
    ) -> Array:
        """Scores of one role, (windows, prompts, seeds); one "window" for baseline and controls.

        `only`: further conditions, column → value.
        """
        column = column or self.column
        only = only or {}
        key = (role, column, *only.items())
        if key not in self._cubes:
            self._cubes[key] = self._read(role, column, only)
        return self._cubes[key]

    def _read(self, role: str, column: str, only: Mapping[str, int]) -> Array:
        part = self.rows[self.rows["role"] == role]
        for name, value in only.items():
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


def _concept_effects(rows: Any, level: float, column: str) -> pd.DataFrame:
    scores = Scores(rows, column)
    widths = rows["width"].dropna()
    width = int(widths.iloc[0]) if len(widths) else 1
    lines = _lines(scores, level)
    cosines = lines
    if column != "clip_score":
        cosines = _lines(Scores(rows), level)
    for line, cosine in zip(lines, cosines, strict=True):
        line["score"] = column
        line |= {"cosine": cosine["estimate"]}
        line |= {"cosine_low": cosine["low"], "cosine_high": cosine["high"]}

    _add_evidence(lines, scores, width=width, level=level)
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


def _lines(scores: Scores, level: float) -> list[Line]:
    """Estimates of the windows, the ceiling, the placebo and the inserts, those of the sweep."""
    import pandas as pd

    lines = estimates("layer", scores.starts("window"), scores.effect_of("window"), level)
    # Sweeps without controls have neither ceiling nor placebo.
    for role in ("ceiling", "placebo"):
        if scores.has(role):
            lines += estimates(role, [pd.NA], scores.effect_of(role), level)
    if scores.has("ceiling") and scores.has("insert"):
        lines += estimates("insert", scores.starts("insert"), _restored(scores), level)
    return lines


def _restored(scores: Scores) -> Array:
    """What each window alone restores of the ceiling's loss, (windows, prompts, seeds)."""
    return scores.effect_of("ceiling") - scores.effect_of("insert")


def _add_evidence(lines: list[Line], scores: Scores, *, width: int, level: float) -> None:
    """What a verdict rests on, added to the lines of windows, inserts and the ceiling."""
    effects = scores.effect_of("window")
    ceiling = scores.effect_of("ceiling") if scores.has("ceiling") else None
    placebo = scores.effect_of("placebo") if scores.has("placebo") else None
    evidence = carrier_evidence(
        effects,
        ceiling=ceiling,
        placebo=placebo,
        width=width,
        level=level,
        starts=scores.starts("window"),
        # All seeds choose, and what is said is corrected for the choice.
        hold_out=False,
    )
    of_axis: dict[str, list[Line]] = {}
    for line in lines:
        of_axis.setdefault(line["axis"], []).append(line)
    for line, more in zip(of_axis["layer"], evidence, strict=True):
        line |= more
    if ceiling is None:
        return
    _add_shares(of_axis["layer"], effects, ceiling, level)
    whole = of_axis["ceiling"][0]
    if whole["low"] <= 0:
        whole["seeds"] = _seeds_to_tell(ceiling[0])
    elif scores.column == "probability":
        possible = possible_change(float(scores.baseline.mean()), scores.rows["kind"].iloc[0])
        whole["seeds"] = _seeds_to_tell(ceiling[0] - TELLS_APART * possible)
    if "insert" in of_axis:
        restored = _restored(scores)
        beyond_none = stats.any_effect(restored, np.zeros_like(ceiling), alpha=stats.ALPHA)
        for line, p_value in zip(of_axis["insert"], beyond_none.p_value, strict=True):
            line["p_any"] = p_value
        _add_shares(of_axis["insert"], restored, ceiling, level)


def _add_shares(lines: Sequence[Line], effects: Array, ceiling: Array, level: float) -> None:
    """Shares of the ceiling with intervals, and how many seeds would tell where they are open."""
    shares = stats.share_interval(effects, ceiling, level=level)
    for place, line in enumerate(lines):
        line["share"] = shares.estimate[place]
        line["share_low"] = shares.low[place]
        line["share_high"] = shares.high[place]
        is_open = line["share_low"] < MIN_SHARE < line["share_high"]
        if is_open and line["share"] > MIN_SHARE / 2:
            line["seeds"] = _seeds_to_tell(effects[place] - MIN_SHARE * ceiling[0])


def _seeds_to_tell(values: Array) -> float:
    """About how many seeds tell the mean of (prompts, seeds) `values` from zero; NaN: unknown."""
    if values.shape[1] < 2 or not values.mean() or not values.mean(0).std() > 0:
        return np.nan
    seeds, _, _ = seeds_needed(values, abs(float(values.mean())))
    return np.nan if seeds is None else seeds


def _content(rows: Any, level: float) -> list[Line]:
    """How much of what should stay is lost at each window and, for comparison, at the controls."""
    # A prompt that shares nothing with its target has no text that should stay.
    with_content = rows[rows.groupby("prompt")["content_score"].transform("count") > 0]
    if with_content.empty:
        return []
    scores = Scores(with_content, "content_score")
    lost = scores.content_lost("window")
    lines = estimates("content", scores.starts("window"), lost, level)
    controls = [scores.content_lost(role) for role in ("ceiling", "placebo") if scores.has(role)]
    if controls:
        usual = max(controls, key=np.mean)  # what a window may lose, and still be about the concept
        # Cosines differ in size from scorer to scorer: the baseline's own is the unit.
        beyond = (lost - usual) / abs(scores.baseline.mean())
        intervals = stats.crossed_bootstrap(beyond, level=level)
        for place, line in enumerate(lines):
            line["beyond"] = intervals.estimate[place]
            line["beyond_low"] = intervals.low[place]
            line["beyond_high"] = intervals.high[place]
    for role in ("ceiling", "placebo"):
        if scores.has(role):
            lines += estimates(f"content_{role}", [None], scores.content_lost(role), level)
    for line in lines:
        line["score"] = "content_score"
        line |= {"cosine": line["estimate"]}
        line |= {"cosine_low": line["low"], "cosine_high": line["high"]}
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
    for line in lines:
        line["score"] = scores.column
    return lines


# --- lines of an effects table, for every localizer ----------------------------------------------


def estimates(axis: str, positions: Sequence[Any], values: Array, level: float) -> list[Line]:
    """One line a window of `values` (windows, prompts, seeds), with its interval."""
    intervals = stats.crossed_bootstrap(values, level=level)
    count = values.shape[1] * values.shape[2]
    lines = []
    for i, position in enumerate(positions):
        line = {"axis": axis, "n": count, "prompts": intervals.prompts, "position": position}
        line["n_seeds"] = values.shape[2]
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
    hold_out: bool = True,
) -> list[Line]:
    """What a carrier is decided by, for each window.

    Args:
        effects: Effects of the windows, (windows, prompts, seeds).
        ceiling: Effect of every layer together, (1, prompts, seeds); None: not measured.
        placebo: What no carrier would do, (1, prompts, seeds); None: not measured.
        width: Layers in a window.
        level: Coverage of the held-out intervals.
        starts: First layer of each window; None: 0, 1, 2, ...
        hold_out: Whether some seeds choose the window and the others judge it (`split_seeds`).
            Otherwise all do both, and the lead is corrected for the choice.

    Returns:
        One dictionary a window: choose, fresh (with fresh_low, fresh_high), p_any, share, and for
        the best window lead, lead_low, p_lead (NaN for others, and where every window overlaps it).
    """
    # Some seeds select the window, the others are held out for its estimate. Both share their
    # prompts, so the held-out estimate takes prompts as fixed (see `stats.simultaneous_lead`). With
    # too few seeds to split, all serve for both, and the lead is corrected for the selection.
    every = range(effects.shape[2])
    groups = stats.split_seeds(every) if hold_out else (every, every)
    selection, held_out = (list(part) for part in groups)
    split = selection != held_out
    prompts = "fixed" if split else None
    fresh = effects[:, :, held_out]  # (windows, prompts, held-out seeds)
    choice = effects[:, :, selection].mean((1, 2))  # (windows,)
    intervals = stats.crossed_bootstrap(fresh, level=level, prompts=prompts)
    p_any = _p_any(effects, placebo)
    whole = _whole_effect(ceiling, held_out)

    lines = []
    for window in range(len(effects)):
        line = {
            "choose": choice[window],
            "fresh": intervals.estimate[window],
            "p_any": p_any[window],
        }
        line["fresh_low"] = intervals.low[window]
        line["fresh_high"] = intervals.high[window]
        line["share"] = fresh[window].mean() / whole
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


def _whole_effect(ceiling: Array | None, held_out: Sequence[int]) -> float:
    """What shares are shares of: the mean effect of every layer together."""
    if ceiling is None:
        return np.nan
    effect = float(ceiling[:, :, held_out].mean())
    # Nothing has no share: not a number, and no warning of numpy's.
    return effect if effect != 0 else np.nan


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


# --- searches that do not look at everything -----------------------------------------------------

# What these searches say of windows, in columns of both tables.
_SAID = {
    "race": ("verdict", "looked", "sure"),
    "attribute": ("search", "verdict", "looked", "others", "sampled", "hits", "missed"),
}


def search_of(table: Any) -> str:
    """How windows were searched, by the columns of a pictures or effects table."""
    if "verdict" not in table:
        return "all"
    return "attribute" if "search" in table else "race"


def partial_effects(
    rows: Any, whole: Callable[[Any], pd.DataFrame], column: str = "clip_score"
) -> pd.DataFrame:
    """The effects table of one concept's race, or of its search by attribution.

    The finalists have all pictures and are judged as in an exhaustive search. Of the other windows
    there is the `estimate` on the `n` pairs they had, without an interval. Every window says what
    became of it (`verdict`) and on how many pairs it was looked at (`looked`).

    - A race: which pairs a window had depends on how it did, and p-values are corrected for all
      windows that it looked at. `sure`: the share of any other window's effect that the winner's
      reaches at least, with 95 % confidence (`racing.Race.sure`).
    - A search by attribution: other seeds chose the finalists, so p-values are corrected for these
      alone, unless a sampled window became one. `missed`: the largest share of the pictures of all
      `others` that may have half of the winner's effect, with 95 % confidence, by `hits` of the
      `sampled` ones (`attribution.search`). Windows without a picture have `n` 0 and no estimate.

    Args:
        rows: The concept's pictures table.
        whole: Gives the effects table of a pictures table in which nothing is missing.
        column: The score that effects are measured by.

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

    on_layers = table["axis"] == "layer"
    for name in ("p_any", "p_lead"):
        corrected = table.loc[on_layers, name] * _chosen_among(rows)
        table.loc[on_layers, name] = corrected.clip(upper=1)
    others = swept[~swept["start"].isin(finalists)]
    parts = [table[on_layers]]
    finalist = table[on_layers].iloc[0]
    if len(others):
        parts.append(_partly_measured(rows, others, finalist, column))
    unseen = _unseen(swept, finalist)
    if len(unseen):
        parts.append(unseen)
    if len(parts) > 1:
        layers = pd.concat(parts, ignore_index=True)
        layers = layers.iloc[layers["position"].argsort(kind="stable")]
        table = pd.concat([layers, table[~on_layers]], ignore_index=True)

    columns = list(_SAID[search_of(rows)])
    verdicts: Any = swept.drop_duplicates("start").set_index("start")[columns]
    table = table.join(verdicts, on="position")
    table.loc[table["axis"] != "layer", columns] = None
    return table


def _chosen_among(rows: Any) -> int:
    """Among how many windows the finalists were picked by pictures that judge them as well."""
    # Bonferroni's correction holds however they were picked.
    if search_of(rows) == "attribute":
        return _count_of_windows(rows) if "challenger" in set(rows["verdict"]) else 1
    return rows.loc[rows["role"] == "window", "start"].nunique()


def _count_of_windows(rows: Any) -> int:
    """How many windows a model has, whether or not they were looked at."""
    # The ceiling replaces all layers; without controls only the search knows how many there are.
    return int(rows["windows"].max())


def _shared(finalist: Any) -> dict[str, Any]:
    """What all lines on the layer axis of one concept share."""
    names = ["method", "concept", "axis", "kind", "width", "baseline", "score"]
    return finalist[names].to_dict()


def _unseen(swept: Any, finalist: Any) -> pd.DataFrame:
    """Lines of the windows that have no picture at all."""
    import pandas as pd

    if "windows" not in swept:  # a race's table from before races could leave windows unseen
        return pd.DataFrame()
    starts = set(range(_count_of_windows(swept))) - set(swept["start"])
    lines = [_shared(finalist) | {"position": start, "n": 0} for start in sorted(starts)]
    return pd.DataFrame(lines)


def _partly_measured(rows: Any, swept: Any, finalist: Any, column: str) -> pd.DataFrame:
    """Lines of windows that have some of the pictures: their paired estimate on these."""
    import pandas as pd

    baseline = rows[rows["role"] == "baseline"].set_index(["prompt", "seed"])[column]
    common = _shared(finalist)
    lines = []
    for start, part in swept.groupby("start"):
        score = part.set_index(["prompt", "seed"])[column]
        change = sign_of(finalist["kind"]) * (score - baseline.loc[score.index])
        estimate = float(change.mean())
        line = {"position": start, "estimate": estimate, "choose": estimate, "n": len(part)}
        lines.append(common | line)
    return pd.DataFrame(lines).astype({"position": "Int64"})


def search_note(layers: pd.DataFrame) -> str:
    """What a search did not look at, and what follows, in words, from its layer axis."""
    return attribution_note(layers) if search_of(layers) == "attribute" else race_note(layers)


def attribution_note(layers: pd.DataFrame) -> str:
    """What a search by attribution did not look at, and bounds what it may have missed."""
    counts: Any = layers["n"].astype(int)
    pairs = int(counts.max())
    partly = int(((counts > 0) & (counts < pairs)).sum())
    never = int((counts == 0).sum())
    notes = [f"{int((counts == pairs).sum())} of {len(layers)} windows measured"]
    if partly:
        most = int(counts[counts < pairs].max())
        amount = "one pair" if most == 1 else f"at most {most}"
        notes.append(f"{partly} seen on {amount} of {pairs} only")
    if never:
        notes.append(f"{never} not looked at")
    window = layers[layers["verdict"] == "chosen"].iloc[0]
    sampled = int(window["sampled"])
    if never and not sampled:
        notes.append("nothing bounds what these would do: all of them overlap what was measured")
    if sampled:
        confidence = percent(1 - stats.ALPHA)
        notes.append(
            f"{int(window['hits'])} of {sampled} random pictures of {int(window['others'])} other "
            f"windows had half of its effect, so at most {math.ceil(100 * window['missed'])} % of "
            f"all of theirs have (confidence {confidence})"
        )
    return "proposed by attribution: " + ", ".join(notes)


def race_note(layers: pd.DataFrame) -> str:
    """What a race did not look at and how sure it is, in words, from its layer axis."""
    counts: Any = layers["n"].astype(int)
    pairs = int(counts.max())
    partial = counts[(counts > 0) & (counts < pairs)]
    never = int((counts == 0).sum())
    notes = []
    if len(partial):
        low, high = partial.min(), partial.max()
        amount = f"{low}" if low == high else f"{low} to {high}"
        notes.append(
            f"{len(partial)} of {len(layers)} windows seen on {amount} of {pairs} pairs only"
        )
    if never:
        notes.append(f"{never} not looked at: the budget paid for those that gradients proposed")
    verdicts = layers["verdict"].tolist()
    if "dropped" in verdicts:
        notes.append(f"{verdicts.count('dropped')} cannot be the best")
    if "cut" in verdicts:
        notes.append(f"{verdicts.count('cut')} left out for the budget's sake")
    sure = float(layers["sure"].dropna().iloc[0])
    if sure > 0:
        least = math.floor(100 * sure)
        confidence = percent(1 - stats.ALPHA)
        notes.append(f"at least {least} % of any other window's effect (confidence {confidence})")
    else:
        notes.append("too few pairs to say how near the best it is")
    return "race: " + ", ".join(notes)


# --- carrier -------------------------------------------------------------------------------------


def carrier(effects: pd.DataFrame, *, min_share: float = MIN_SHARE) -> Verdict:
    """Decide where a concept is: one place, several, spread, nowhere, or not decided yet.

    The rule (its constants are in `localization.verdict`): shares are of the ceiling's effect. If
    the ceiling's interval lies within a small effect of zero, nobody hears the concept; if it holds
    zero or lies below it, or the probability hardly changes even in all layers, the verdict is
    inconclusive. A window is *necessary* where its share is at least `min_share`, the interval of
    the share does not reach far below that, and the effect is beyond zero and the placebo,
    corrected for all windows; it is *sufficient* where the same holds of its insert. A window that
    may be so, or whose picture became another one (an effect, or a loss of content, far beyond the
    ceiling's), is open. Windows that overlap are one place: places are the fewest separate windows
    that every passing one overlaps. An open window elsewhere makes the verdict inconclusive.
    Otherwise one necessary place is "one place", two or more are "each necessary"; where none is
    necessary, two or more sufficient ones are "each sufficient", and all else is "spread", as are
    more than three places.

    Args:
        effects: The effects table of one concept, from `effect`.
        min_share: Smallest share of the ceiling's effect that a place needs, 0 to 1.

    Returns:
        The verdict: its `kind`, the `places` that it speaks of and the `reason`; it iterates over
        the layers of the one place, and over none where there is none. Its `evidence` is a table
        with one row a question and place: question ("ceiling", "necessity", "sufficiency",
        "content", "another picture"), place, estimate, low, high, share, share_low, share_high, p,
        and `passes` (missing: open). "content" passes where it stays; "another picture" where one
        came.

    Raises:
        LocogenError: If the table has several concepts.

    Example:
        >>> import pandas as pd
        >>> line = {"concept": "neon", "axis": "layer", "width": 2, "p_any": 0.01}
        >>> near = {"share": 0.9, "share_low": 0.8, "share_high": 1.0}
        >>> far = {"share": 0.1, "share_low": 0.0, "share_high": 0.2}
        >>> rows = [{"position": 5, "estimate": 0.3} | near, {"position": 9, "estimate": 0.1} | far]
        >>> ceiling = {"axis": "ceiling", "low": 0.3, "high": 0.4}
        >>> verdict = carrier(pd.DataFrame([line | row for row in [*rows, ceiling]]))
        >>> print(verdict, "|", verdict.reason)
        layers 5-6 | the picture needs it (90 % [80 %, 100 %] of the ceiling's effect)
    """
    names = list(dict.fromkeys(effects["concept"]))
    if len(names) != 1:
        raise LocogenError(
            f"the effects are of {len(names)} concepts: "
            "select one, effects[effects.concept == name]"
        )
    verdict = judge(effects, min_share)
    layers: Any = effects[effects["axis"] == "layer"]
    if search_of(layers) == "all":
        return verdict
    return replace(verdict, reason=f"{verdict.reason}; {search_note(layers)}")
