"""What plots and pages say, computed from saved tables: matrices, findings, sentences.

The tables are those of `locogen.localization`: pictures (a row an image) and effects (a row an
estimate).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.markup import interval_text, number, percent
from locogen.plan import Window
from locogen.views.sentences import describe_verdict, few_seeds_note, verdict_note

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = ("baseline", "placebo", "ceiling")
GAP = ""  # the empty column between the windows and the controls
NUMBERS = ("estimate", "low", "high")
# Measures of an edit → what is looked at; any other is a kind of attack.
MEASURE_WORDS = {
    "efficacy": "its own prompts",
    "generality": "in other words",
    "specificity": "its neighbors",
    "ordinary": "prompts without it",
    "chance": "neighbors, taken for it",
    "name": "its name alone",
    "short": "a short prompt",
    "long": "long prompts",
    "variant": "variants of its prompts",
    "implicit": "without its name",
    "rest": "the rest of its prompts",
}
HELD_OUT = ("fresh", "fresh_low", "fresh_high")  # the same on seeds that did not choose the window
PROPOSING = "attribution"  # the method whose estimates are shares that gradients propose
Carriers = Mapping[str, Window] | Window | None
Row = dict[str, Any]


def effect_matrix(effects: pd.DataFrame, *, axis: str = "layer") -> pd.DataFrame:
    """Estimates along one axis, (concepts, positions), in the order of the table and of the layers.

    A concept measured by several methods or window widths gets one row each.
    """
    rows = _along(effects, axis)
    matrix = rows.pivot(index="label", columns="position", values="estimate")
    # `pivot` sorts concepts by name; the table's order is the one that was asked for.
    return matrix.reindex(index=rows["label"].unique()).astype(float)


def score_matrix(table: pd.DataFrame) -> pd.DataFrame:
    """Mean raw CLIP-score of unedited pictures, (concepts, window starts + gap + the controls)."""
    rows = _unedited(table)
    swept = rows[rows["role"] == "window"]
    if swept.empty:
        raise LocogenError(
            "the pictures table has no row of role 'window': give plot_scores() that of a sweep"
        )
    means = swept.astype({"start": int}).groupby(["concept", "start"])["clip_score"].mean()
    matrix = (
        means.unstack().sort_index(axis=1).reindex(index=swept["concept"].unique()).astype(float)
    )
    matrix.columns = [int(start) for start in matrix.columns]
    for role in CONTROLS:
        mean: Any = rows[rows["role"] == role].groupby("concept")["clip_score"].mean()
        # Sweeps without controls have a baseline only.
        if mean.empty:
            continue
        if GAP not in matrix:
            matrix[GAP] = float("nan")
        matrix[role] = mean.reindex(matrix.index).astype(float)
    return matrix


def timesteps_matrix(effects: pd.DataFrame, concept: str | None = None) -> pd.DataFrame:
    """Estimates of one concept's windows by time, (spans of steps, window starts)."""
    rows: Any = effects[effects["axis"] == "timesteps"]
    # In the order of the table, which is the study's.
    names = list(dict.fromkeys(rows["concept"]))
    if not names:
        raise LocogenError(
            "the effects table has no row of axis 'timesteps': "
            "sweep with timesteps=[(first, last), …]"
        )
    concept = _one_concept(concept, names, "plot_timesteps")
    whole = dict.fromkeys(("first_timestep", "last_timestep", "position"), int)
    rows = rows[rows["concept"] == concept].astype(whole)
    matrix = rows.pivot(
        index=["first_timestep", "last_timestep"], columns="position", values="estimate"
    ).sort_index()
    matrix.index = [_span_label(first, last) for first, last in matrix.index]
    matrix.columns = [int(start) for start in matrix.columns]
    return matrix.astype(float)


def _span_label(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first}-{last}"


def _one_concept(concept: str | None, names: Sequence[str], caller: str) -> str:
    """The concept that was named, or the only one there is."""
    if concept is None and len(names) == 1:
        return names[0]
    if concept is None or concept not in names:
        listed = ", ".join(names)
        raise LocogenError(f"{caller}() shows one concept, got {concept!r}: name one of {listed}")
    return concept


def curves(effects: pd.DataFrame, concept: str | None = None) -> dict[str, list[Row]]:
    """Rows of one concept by axis (layer, insert, ceiling, placebo), each sorted by position."""
    names = effects["concept"].astype(str)
    concept = _one_concept(concept, list(names.unique()), "plot_curve")
    rows: Any = effects[names == concept].astype({"concept": str})
    by_axis: dict[str, list[Row]] = {}
    for axis in ("layer", "insert", "ceiling", "placebo"):
        on_axis = rows[rows["axis"] == axis].rename(columns=str).to_dict("records")
        if on_axis:
            by_axis[axis] = sorted(on_axis, key=_place)
    return by_axis


def _place(row: Row) -> int:
    """The position of a row; controls, which have none, come first."""
    return 0 if missing(row["position"]) else int(row["position"])


def strip_rows(table: pd.DataFrame, carrier: Window) -> pd.DataFrame:
    """Choose the rows to show as a strip: baseline, windows and ceiling of one prompt and seed.

    Args:
        table: The pictures table of a sweep, from `localize`.
        carrier: The window to mark; one without layers marks nothing.

    Returns:
        The rows of the first prompt and its smallest seed, with two more columns: `label`, and
        `marked`, whether the row's window is the carrier.

    Example:
        >>> import pandas as pd
        >>> row = {"prompt": "a cat", "seed": 0, "width": 2}
        >>> roles = [{"role": "baseline", "start": None}, {"role": "window", "start": 3}]
        >>> rows = strip_rows(pd.DataFrame([row | role for role in roles]), Window(3, 2))
        >>> list(rows["label"]), list(rows["marked"])
        (['baseline', '3-4'], [False, True])
    """
    is_first = (table["prompt"] == table["prompt"].iloc[0]) & (table["seed"] == table["seed"].min())
    first: Any = table[is_first]
    rows = first[first["role"].isin(["baseline", "window", "ceiling"])]
    labels = []
    marked = []
    for role, start, width in zip(rows["role"], rows["start"], rows["width"], strict=True):
        if missing(start):
            labels.append(role)
            marked.append(False)
        else:
            labels.append(Window(int(start), int(width)).label)
            marked.append(int(start) == carrier.start)
    return rows.assign(label=labels, marked=marked)


def carrier_cells(
    effects: pd.DataFrame, carriers: Carriers, *, axis: str = "layer"
) -> dict[str, int | None]:
    """Row of `effect_matrix` → start of its carrier; None: no single window."""
    rows = _along(effects, axis)
    windows = _by_concept(carriers, list(rows["concept"].unique()))
    cells: dict[str, int | None] = {}
    for label, part in rows.groupby("label", sort=False):
        carrier = windows.get(part["concept"].iloc[0])
        if carrier is None:
            continue
        # A concept swept with several widths has a row for each: the carrier belongs to its own.
        if "width" not in part or carrier.width in set(part["width"]):
            cells[str(label)] = carrier.start
    return cells


def carrier_notes(
    effects: pd.DataFrame, carriers: Carriers, *, axis: str = "layer"
) -> dict[str, str]:
    """Row of `effect_matrix` → why no carrier is outlined in it; only rows that have none."""
    rows = _along(effects, axis)
    windows = _by_concept(carriers, list(rows["concept"].unique()))
    labels: Any = rows.drop_duplicates("label").set_index("label")["concept"]
    notes = {}
    for label, start in carrier_cells(effects, carriers, axis=axis).items():
        if start is None:
            notes[label] = f"({verdict_note(windows[labels[label]])})"
    return notes


def findings(effects: pd.DataFrame, carriers: Carriers = None) -> list[Row]:
    """What the table says about each concept, one row each: the numbers behind `describe`.

    Keys: label, concept, kind, judged (a carrier was given), start (None: no single window), at
    (the window spoken of: the carrier, or else the largest effect), width, proposed (shares that
    gradients propose, which no picture has tested), estimate, low, high,
    fresh (measured on seeds not used to choose the window), share (of the ceiling; with share_low
    and share_high), rival (the largest effect that does not overlap; with rival_low and
    rival_high), reason, verdict (the kind of a `Verdict`, else ""), places (that it speaks of),
    score (that the numbers are of), n, seeds (NaN: unknown), content (how much of what should stay
    is lost there: `estimate`, `low`, `high`), content_ceiling, content_placebo.
    """
    layers = _along(effects, "layer")
    windows = _by_concept(carriers, list(layers["concept"].unique()))
    rows = []
    for label, part in layers.groupby("label", sort=False):
        concept = part["concept"].iloc[0]
        lines = {line["position"]: line for line in part.to_dict("records")}
        others = _other_axes(effects, part)
        ceiling = others.get(("ceiling", None), {}).get("estimate")
        row = _finding(str(label), lines, windows.get(concept), ceiling)
        row["content"] = others.get(("content", row["at"]))
        row["content_ceiling"] = others.get(("content_ceiling", None))
        row["content_placebo"] = others.get(("content_placebo", None))
        rows.append(row)
    return rows


def _other_axes(effects: pd.DataFrame, part: Any) -> dict[tuple[str, int | None], Row]:
    """Numbers of the same concept and width on other axes than "layer", by axis and position."""
    same = (effects["concept"] == part["concept"].iloc[0]) & (effects["axis"] != "layer")
    others: Any = effects[same]
    # A concept swept with several widths has other axes for each of them.
    if "width" in others and "width" in part:
        others = others[others["width"] == part["width"].iloc[0]]
    values: dict[tuple[str, int | None], Row] = {}
    for line in others.to_dict("records"):
        place = line["position"]
        numbers = {name: line.get(name) for name in NUMBERS}
        values[line["axis"], None if missing(place) else int(place)] = numbers
    return values


def rows_of(effects: pd.DataFrame, label: str) -> pd.DataFrame:
    """The windows that one row of `findings` speaks of, in the order of the layers."""
    rows = _along(effects, "layer")
    return rows[rows["label"] == label].sort_values("position")


def describe(effects: pd.DataFrame, carriers: Carriers = None, *, short: bool = False) -> str:
    """Put the findings in plain words, one sentence a concept, as for alt texts.

    Args:
        effects: The effects table, from `effect`.
        carriers: Concept → `Window`, or one `Window` for a table of one concept; None: the window
            with the largest effect is described, without calling it the carrier.
        short: Whether to leave out intervals and rivals.

    Returns:
        The sentences, joined by spaces.

    Raises:
        LocogenError: If a carrier is not in the table, or one is given for several concepts.

    Example:
        >>> import pandas as pd
        >>> line = {"concept": "neon", "axis": "layer", "kind": "style", "width": 2, "share": None}
        >>> sizes = [{"position": 3, "estimate": 0.1}, {"position": 8, "estimate": 0.4}]
        >>> effects = pd.DataFrame([line | size | {"low": None, "high": None} for size in sizes])
        >>> describe(effects, Window(8, 2), short=True)
        'neon: the window of layers 8-9, effect 0.40.'
    """
    return " ".join(sentence(row, short=short) for row in findings(effects, carriers))


def sentence(row: Mapping[str, Any], *, short: bool = False) -> str:
    """One row of `findings` in plain words."""
    label = row["label"]
    place = _place_text(Window(row["at"], row["width"]))
    size = amount(row)
    note = "" if short else _worth(row)
    if row["proposed"] and not row["judged"]:
        rest = "" if short else f"; no picture has tested it{note}"
        return f"{label}: {proposal(row, place)}{rest}."
    if row["judged"] and row["start"] is None:
        verdict = describe_verdict(row.get("verdict", ""), row.get("places", ()))
        reason = f" ({row['reason']})" if row["reason"] else ""
        rest = "" if short else f"; the largest effect, {size}, is that of {place}{note}"
        return f"{label}: {verdict}{reason}{rest}."
    if short:
        return f"{label}: {place}, effect {size}{_share_of_ceiling(row)}."
    return f"{label}: {_effect_text(row, place)}{note}."


def _place_text(window: Window) -> str:
    # "The window", so that the verb of the sentence is in the singular.
    return f"the window of {window}" if window.width > 1 else str(window)


def _effect_text(row: Mapping[str, Any], place: str) -> str:
    """What a window does, and what else is known of it."""
    # Without a carrier, the sentence does not claim that the window carries the concept.
    subject = place if row["judged"] else f"the largest effect is that of {place}, which"
    held_out = " on seeds not used to choose it" if row["fresh"] else ""
    change = f"{_change(row)}{held_out}{_share_of_ceiling(row)}"
    return f"{subject} {change}{_elsewhere(row)}{_content(row)}{_unseen(row)}"


def _worth(row: Mapping[str, Any]) -> str:
    """What its interval is worth, where it is over few seeds; what has none is said to."""
    return "" if missing(row["low"]) else few_seeds_note(row.get("seeds", math.nan))


def proposal(row: Mapping[str, Any], place: str) -> str:
    """Put in words what gradients propose, and whether its interval leaves out zero.

    Args:
        row: A row of `findings`.
        place: Its window in words.

    Example:
        >>> row = {"estimate": 0.02, "low": -0.3, "high": 0.34}
        >>> print(proposal(row, "layers 3-4"))
        gradients propose layers 3-4, a share of 0.02 [−0.30, 0.34], which may be none, of what all
        layers do
    """
    doubt = ""
    if missing(row["low"]) or missing(row["high"]):
        doubt = ", without an interval,"
    elif row["low"] <= 0 <= row["high"]:
        doubt = ", which may be none,"
    return f"gradients propose {place}, a share of {amount(row)}{doubt} of what all layers do"


def _elsewhere(row: Mapping[str, Any]) -> str:
    if missing(row["rival"]):
        return ""
    has_none = missing(row["rival_low"]) or missing(row["rival_high"])
    bounds = ", without an interval" if has_none else ""
    return f"; next best elsewhere {amount(row, 'rival')}{bounds}"


def _unseen(row: Mapping[str, Any]) -> str:
    """What a search that measures few windows leaves open."""
    if not row["unseen"]:
        return ""
    return f"; {row['unseen']} of {row['windows']} windows were not looked at"


def _share_of_ceiling(row: Mapping[str, Any]) -> str:
    if missing(row["share"]):
        return ""
    return f" ({ceiling_share(row)} of the ceiling)"


def ceiling_share(row: Mapping[str, Any]) -> str:
    """A share in percent, with its interval where there is one.

    Args:
        row: With `share`, and `share_low` and `share_high` where it has an interval.

    Example:
        >>> ceiling_share({"share": 0.85, "share_low": 0.7, "share_high": 1.02})
        '85 % [70 %, 102 %]'
    """
    share = percent(row["share"])
    if missing(row.get("share_low")) or missing(row.get("share_high")):
        return share
    return f"{share} [{percent(row['share_low'])}, {percent(row['share_high'])}]"


def _change(row: Mapping[str, Any]) -> str:
    """`lowers the CLIP-score by 0.34 [0.28, 0.40]`, or that nothing is clear."""
    score = "probability" if row.get("score") == "probability" else "CLIP-score"
    # One prompt under one seed has no interval, and then nothing says that it was not luck.
    if missing(row["low"]):
        return f"has an effect of {amount(row)}, without an interval"
    if row["low"] <= 0 <= row["high"]:
        return f"has no clear effect on the {score} ({amount(row)})"
    # A positive effect lowers the score of styles and objects, and raises that of facts.
    lowers = (row["kind"] == "fact") == (row["estimate"] < 0)
    verb = "lowers" if lowers else "raises"
    size = {name: row[name] for name in NUMBERS}
    # The verb has the sign: the amount is positive, and its interval turns over.
    if row["estimate"] < 0:
        size = {"estimate": -row["estimate"], "low": -row["high"], "high": -row["low"]}
    return f"{verb} the {score} by {amount(size)}"


def _content(row: Mapping[str, Any]) -> str:
    """How much of what should stay is lost at a window, and, to compare, at the controls."""
    names = {"content": "", "content_ceiling": "ceiling ", "content_placebo": "placebo "}
    if missing(row.get("content")):
        return ""
    losses = {name: row[axis] for axis, name in names.items() if not missing(row.get(axis))}
    window, *controls = (name + amount(loss) for name, loss in losses.items())
    compared = f" ({', '.join(controls)})" if controls else ""
    return f"; lost of what should stay: {window}{compared}"


def amount(row: Mapping[str, Any], name: str = "estimate") -> str:
    """Write a number of a table with its interval, if it has one.

    Args:
        row: A row of an effects table, or of `findings`.
        name: Its number; one other than "estimate" has its ends in `{name}_low` and `{name}_high`.

    Example:
        >>> amount({"estimate": 0.344, "low": 0.28, "high": 0.4})
        '0.34 [0.28, 0.40]'
    """
    start = "" if name == "estimate" else f"{name}_"
    ends = (_float(row[f"{start}{end}"]) for end in ("low", "high"))
    return interval_text(_float(row[name]), *ends)


def missing(value: Any) -> bool:
    """Whether a cell of a table is empty: None, NaN or NA."""
    import pandas as pd

    return value is None or bool(pd.isna(value))


def _measured(label: str, lines: Mapping[int, Row], at: int) -> Row:
    """The row of a window; raises where the table has none, or no picture of it."""
    if at not in lines:
        raise LocogenError(
            f"{label}: its carrier starts at layer {at}, which the effects table does not have: "
            "give the carrier of this table"
        )
    if missing(lines[at]["estimate"]):
        raise LocogenError(
            f"{label}: the window at layer {at} was not looked at: measure it (search='all')"
        )
    return lines[at]


def _finding(label: str, lines: dict[int, Row], carrier: Window | None, ceiling: Any) -> Row:
    """One row of `findings`. `lines`: window start → its row of the effects table."""
    start = None
    width = None
    reason = ""
    if carrier is not None:
        start = carrier.start
        width = carrier.width
        reason = carrier.reason

    # Without a carrier, or with one that names no window, the largest effect is spoken of.
    at = _largest(lines) if start is None else int(start)
    line = _measured(label, lines, at)
    if width is None:
        width = int(line.get("width", 1))
    # A carrier is spoken of by what was measured on other seeds than those that chose it.
    fresh = start is not None and _chosen_apart(lines)
    names = HELD_OUT if fresh else NUMBERS
    estimate, low, high = (_float(line.get(name)) for name in names)
    # Where shares have intervals, none is given if the ceiling is too small for one.
    share = line.get("share")
    rival = _best_elsewhere(lines, at, width, names[0])
    if "share_low" not in line:
        share = _share(share, estimate, ceiling)
    return {
        "label": label,
        "concept": line["concept"],
        "kind": line.get("kind", ""),
        "judged": carrier is not None,
        "proposed": line.get("method") == PROPOSING,
        "start": start,
        "at": at,
        "width": width,
        "estimate": estimate,
        "low": low,
        "high": high,
        "fresh": fresh,
        "share": share,
        "share_low": line.get("share_low"),
        "share_high": line.get("share_high"),
        "rival": _float(rival.get(names[0])),
        "rival_low": _float(rival.get(names[1])),
        "rival_high": _float(rival.get(names[2])),
        "reason": reason,
        "verdict": getattr(carrier, "kind", ""),
        "places": getattr(carrier, "places", ()),
        "score": line.get("score"),
        "n": line.get("n"),
        "seeds": _float(line.get("n_seeds")),
        "unseen": sum(1 for other in lines.values() if other.get("n") == 0),
        "windows": len(lines),
    }


def _largest(lines: Mapping[int, Row]) -> int:
    """Start of the window with the largest estimate."""
    looked_at = [start for start, line in lines.items() if not missing(line["estimate"])]
    return max(looked_at, key=lambda start: lines[start]["estimate"])


def _best_elsewhere(lines: Mapping[int, Row], at: int, width: int, name: str) -> Row:
    """The line with the largest number that does not overlap the one at `at`; empty without any."""
    elsewhere = [line for start, line in lines.items() if abs(start - at) >= width]
    # Windows that a search did not look at have none.
    measured = [line for line in elsewhere if not missing(line[name])]
    return max(measured, key=lambda line: line[name], default={})


def _float(value: Any) -> float:
    return float("nan") if missing(value) else float(value)


def _share(share: Any, estimate: float, ceiling: Any) -> Any:
    """The share of the ceiling as the table has it, or computed where it has none."""
    if not missing(share):
        return share
    # A share of nothing, or of an effect in the other direction, says nothing.
    if missing(ceiling) or not ceiling > 0:
        return float("nan")
    return estimate / ceiling


def _chosen_apart(lines: Mapping[int, Row]) -> bool:
    """Whether `fresh` comes from other seeds than `choose`; few seeds serve for both."""
    is_apart = False
    for line in lines.values():
        choose: Any = line.get("choose")
        fresh: Any = line.get("fresh")
        if missing(choose) or missing(fresh):
            return False
        # Sums of the same scores may differ by rounding.
        if not math.isclose(choose, fresh, abs_tol=1e-12):
            is_apart = True
    return is_apart


def _along(effects: Any, axis: str) -> Any:
    """The rows of one axis, with a `label` that tells methods and widths apart."""
    rows = effects[(effects["axis"] == axis) & effects["position"].notna()].astype(
        {"position": int}
    )
    if rows.empty:
        axes = ", ".join(sorted(set(effects["axis"].astype(str)))) or "nothing"
        raise LocogenError(f"the effects table has no positions along {axis!r}: it has {axes}")
    rows = rows.assign(label=_labels(rows))
    # A matrix has one cell for each: two runs' tables in one would hide each other.
    repeated = rows[rows.duplicated(["label", "position"])]
    if len(repeated):
        name, start = repeated[["label", "position"]].iloc[0]
        raise LocogenError(
            f"{name}: the effects table has {axis} {start} more than once: give one run's table"
        )
    return rows


def _labels(rows: Any) -> Any:
    """The concept's name alone, unless some concept was measured in several ways."""
    label = rows["concept"].astype(str)
    for column, word in (("method", ""), ("width", "width ")):
        if column not in rows:
            continue
        ways = rows.groupby("concept")[column].nunique()
        if ways.max() > 1:
            label = label + " · " + word + rows[column].astype(str)
    return label


def _unedited(table: Any) -> Any:
    """The pictures that were made without an edit."""
    if "edit" not in table:
        return table
    return table[table["edit"].isna() | (table["edit"].astype(str) == "")]


def _by_concept(carriers: Carriers, concepts: Sequence[str]) -> Mapping[str, Window]:
    if carriers is None:
        return {}
    if isinstance(carriers, Mapping):
        return carriers
    if len(concepts) != 1:
        raise LocogenError(
            f"one carrier window for {len(concepts)} concepts: give a dict, concept → Window"
        )
    return {concepts[0]: carriers}


# --- edits ---------------------------------------------------------------------------------------


def measure_label(measure: str, sign: float = 0) -> str:
    """What a measure of an edit looks at, and which way is good.

    Args:
        measure: As in the table of an evaluation.
        sign: 1 where more is better, -1 where less is; 0 or NaN: nothing is said.

    Returns:
        Words, and an arrow up or down.

    Example:
        >>> measure_label("specificity", 1)
        'its neighbors ↑'
    """
    words = MEASURE_WORDS.get(measure, f"attack: {measure}")
    if sign == 0 or math.isnan(sign):
        return words
    return f"{words} {'↑' if sign > 0 else '↓'}"


def evaluation_table(summary: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Put what one edit did in a table that people read.

    Args:
        summary: The means of an evaluation, from `summary`.
        arm: The edit's arm.

    Returns:
        One row a measure, in words, with an arrow where more (↑) or fewer (↓) right pictures are
        better: the share of right pictures before and after and its change in points, with their
        95 % intervals; how much the pictures are like the unedited ones (SSIM); the number of units
        (prompts) and of pictures. A dash where nothing was measured.

    Raises:
        LocogenError: The summary lacks the arm.

    Example:
        >>> import pandas as pd
        >>> row = {"arm": "layer 3", "measure": "efficacy", "quantity": "right", "sign": -1}
        >>> row |= {"before": 1.0, "after": 0.0, "after_low": 0.0, "after_high": 0.459, "units": 6}
        >>> table = evaluation_table(pd.DataFrame([row | {"n": 24}]), "layer 3")
        >>> table.loc["its own prompts ↓", ["before", "after [95 %]"]].tolist()
        ['100 %', '0 % [0, 46]']
    """
    import pandas as pd

    of_arm: Any = summary[summary["arm"] == arm]
    if of_arm.empty:
        arms = ", ".join(map(str, dict.fromkeys(summary["arm"])))
        raise LocogenError(f"the summary has no arm {arm!r}: it has {arms}")
    lines = {}
    for measure, part in of_arm.groupby("measure", sort=False):
        by_quantity = {line["quantity"]: line for line in part.to_dict("records")}
        right = by_quantity.get("right")
        counts = next(iter(by_quantity.values()))
        label = measure_label(str(measure), counts.get("sign", 0) if right else 0)
        lines[label] = {
            **_share_cells(right or {}),
            "like unedited (SSIM)": _ssim_cell(by_quantity.get("ssim", {})),
            "prompts": number(counts["units"], 0),
            "pictures": number(counts["n"], 0),
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def _share_cells(line: Mapping[Any, Any]) -> dict[str, str]:
    """A share of right pictures before and after, and its change."""
    before, after, change = (line.get(name, math.nan) for name in ("before", "after", "change"))
    return {
        "before": percent(before),
        "after [95 %]": percent(after) + _ends(line, "after_low", "after_high"),
        "change [95 %]": number(100 * change, 0) + _ends(line, "low", "high"),
    }


def _ends(line: Mapping[Any, Any], *names: str) -> str:
    """The ends of an interval in percent; "" where there is none."""
    ends = [100 * line.get(name, math.nan) for name in names]
    if any(map(math.isnan, ends)):
        return ""
    return f" [{', '.join(number(end, 0) for end in ends)}]"


def _ssim_cell(line: Mapping[Any, Any]) -> str:
    mean, *ends = (line.get(name, math.nan) for name in ("after", "after_low", "after_high"))
    if math.isnan(mean) or any(map(math.isnan, ends)):
        return number(mean, 2)
    return f"{number(mean, 2)} [{', '.join(number(end, 2) for end in ends)}]"
