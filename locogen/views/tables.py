"""What plots and pages say, computed from saved tables: matrices to draw, findings as rows and sentences.

The tables are those of `locogen.localization.localize`: pictures (a row an image) and effects (a row an estimate).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from locogen.errors import LocogenError

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = ("baseline", "placebo", "ceiling")
GAP = ""  # the empty column between the windows and the controls
NUMBERS = ("estimate", "low", "high")


class Carrier(Protocol):
    """What is read of a `locogen.Window`."""

    @property
    def start(self) -> int | None:
        """Layer, 0-based in execution order; None: no single window."""
        ...

    @property
    def width(self) -> int:
        """Number of layers."""
        ...

    @property
    def reason(self) -> str:
        """Why this window, or why none."""
        ...


Carriers = Mapping[str, Carrier] | Carrier | None


def effect_matrix(effects: pd.DataFrame, *, axis: str = "layer") -> pd.DataFrame:
    """Estimates along one axis, (concepts, positions), in the order of the table and of the layers.

    A concept measured by several methods or window widths gets one row each.
    """
    rows = _along(effects, axis)
    matrix = rows.pivot(index="label", columns="position", values="estimate")
    return matrix.reindex(index=rows["label"].unique()).astype(float)


def score_matrix(table: pd.DataFrame) -> pd.DataFrame:
    """Mean raw CLIP-score of unedited pictures, (concepts, window starts + gap + the controls)."""
    rows = _unedited(table)
    swept = rows[rows["role"] == "window"]
    if swept.empty:
        raise LocogenError("the pictures table has no row of role 'window': plot_scores() needs a sweep")
    means = swept.astype({"start": int}).groupby(["concept", "start"])["clip_score"].mean()
    matrix = means.unstack().sort_index(axis=1).reindex(index=swept["concept"].unique()).astype(float)
    matrix.columns = [int(start) for start in matrix.columns]
    controls = {role: rows[rows["role"] == role].groupby("concept")["clip_score"].mean() for role in CONTROLS}
    present = {role: mean for role, mean in controls.items() if len(mean)}
    if present:
        matrix[GAP] = float("nan")
    for role, mean in present.items():
        matrix[role] = mean.reindex(matrix.index).astype(float)
    return matrix


def timesteps_matrix(effects: pd.DataFrame, concept: str | None = None) -> pd.DataFrame:
    """Estimates of one concept's windows by when they heard the target, (spans of steps, window starts)."""
    rows: Any = effects[effects["axis"] == "timesteps"]
    known = list(dict.fromkeys(rows["concept"]))
    if not known:
        raise LocogenError("the effects table has no row of axis 'timesteps': sweep with timesteps=[(first, last), …]")
    concept = known[0] if concept is None and len(known) == 1 else concept
    if concept not in known:
        raise LocogenError(f"plot_timesteps() shows one concept, got {concept!r}: name one of {', '.join(known)}")
    rows = rows[rows["concept"] == concept].astype({"first_timestep": int, "last_timestep": int, "position": int})
    matrix = rows.pivot(index=["first_timestep", "last_timestep"], columns="position", values="estimate").sort_index()
    matrix.index = [f"step {a}" if a == b else f"steps {a}-{b}" for a, b in matrix.index]
    matrix.columns = [int(start) for start in matrix.columns]
    return matrix.astype(float)


def curves(effects: pd.DataFrame, concept: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Rows of one concept by axis (layer, insert, ceiling, placebo), each sorted by position."""
    rows = effects.to_dict("records")
    known = list(dict.fromkeys(str(row["concept"]) for row in rows))
    if concept is None and len(known) == 1:
        concept = known[0]
    if concept not in known:
        raise LocogenError(f"plot_curve() shows one concept, got {concept!r}: name one of {', '.join(known)}")
    found: dict[str, list[dict[str, Any]]] = {}
    for axis in ("layer", "insert", "ceiling", "placebo"):
        chosen = [{str(k): v for k, v in row.items()} for row in rows if row["axis"] == axis]
        chosen = [row for row in chosen if str(row["concept"]) == concept]
        if chosen:
            found[axis] = sorted(chosen, key=lambda row: 0 if missing(row["position"]) else int(row["position"]))
    return found


def strip_rows(table: pd.DataFrame, carrier: Carrier) -> pd.DataFrame:
    """The rows to show as a strip: the first prompt and seed, as it is, with each window, and the ceiling.

    Beside the table's columns: `label`, and `marked`, whether the row's window is the carrier's.
    """
    first: Any = table[(table["prompt"] == table["prompt"].iloc[0]) & (table["seed"] == table["seed"].min())]
    rows = first[first["role"].isin(["baseline", "window", "ceiling"])]
    places = [None if missing(start) else int(start) for start in rows["start"]]
    ends = [None if at is None else at + int(width) - 1 for at, width in zip(places, rows["width"], strict=True)]
    names = zip(rows["role"], places, ends, strict=True)
    labels = [role if at is None else f"{at}" if at == end else f"{at}-{end}" for role, at, end in names]
    return rows.assign(label=labels, marked=[at is not None and at == carrier.start for at in places])


def carrier_cells(effects: pd.DataFrame, carriers: Carriers, *, axis: str = "layer") -> dict[str, int | None]:
    """Row of `effect_matrix` → start of its carrier window; None where there is no single window."""
    rows = _along(effects, axis)
    chosen = _by_concept(carriers, list(rows["concept"].unique()))
    cells: dict[str, int | None] = {}
    for label, found in rows.groupby("label", sort=False):
        carrier = chosen.get(found["concept"].iloc[0])
        if carrier is not None and ("width" not in found or carrier.width in set(found["width"])):
            cells[str(label)] = carrier.start
    return cells


def findings(effects: pd.DataFrame, carriers: Carriers = None) -> list[dict[str, Any]]:
    """What the table says about each concept, one row each: the numbers behind `describe` and the report.

    Keys: label, concept, kind, judged (a carrier was given), start (None: no single window), at (the window
    spoken of: the carrier, or else the largest effect), width, estimate, low, high, fresh (measured on seeds
    not used to choose the window), share (of the ceiling), rival (the largest effect that does not overlap),
    reason, n, content (how much of what should stay is lost there), content_ceiling, content_placebo.
    """
    layers = _along(effects, "layer")
    chosen = _by_concept(carriers, list(layers["concept"].unique()))
    found = []
    for label, rows in layers.groupby("label", sort=False):
        concept = rows["concept"].iloc[0]
        lines = {row["position"]: row for row in rows.to_dict("records")}
        others: Any = effects[(effects["concept"] == concept) & (effects["axis"] != "layer")]
        if "width" in others and "width" in rows:
            others = others[others["width"] == rows["width"].iloc[0]]
        values = {
            (axis, None if missing(place) else int(place)): estimate
            for axis, place, estimate in others[["axis", "position", "estimate"]].itertuples(index=False)
        }
        row = _finding(str(label), lines, chosen.get(concept), values.get(("ceiling", None)))
        places = {"content": row["at"], "content_ceiling": None, "content_placebo": None}
        found.append(row | {axis: values.get((axis, place)) for axis, place in places.items()})
    return found


def rows_of(effects: pd.DataFrame, label: str) -> pd.DataFrame:
    """The effects of the windows that one row of `findings` speaks of, in the order of the layers."""
    rows = _along(effects, "layer")
    return rows[rows["label"] == label].sort_values("position")


def describe(effects: pd.DataFrame, carriers: Carriers = None, *, short: bool = False) -> str:
    """The findings in plain words, one sentence a concept: alt text for figures, first words of a page.

    `carriers`: concept → `Window`, or one `Window` for a table of one concept.
    """
    return " ".join(sentence(row, short=short) for row in findings(effects, carriers))


def sentence(row: Mapping[str, Any], *, short: bool = False) -> str:
    """One row of `findings` in plain words."""
    digits = precision(row["estimate"])
    amount = number(row["estimate"], digits) + interval(row, digits)
    place = place_name(row["at"], row["width"])
    share = "" if missing(row["share"]) else f" ({100 * row['share']:.0f} % of the ceiling)".replace("-", "−")
    if row["judged"] and row["start"] is None:
        reason = f" ({row['reason']})" if row["reason"] else ""
        rest = "" if short else f"; the largest effect, {amount}, is that of {place}"
        return f"{row['label']}: no single window carries it{reason}{rest}."
    if short:
        return f"{row['label']}: {place}, effect {amount}{share}."
    falls = (row["kind"] == "fact") == (row["estimate"] < 0)
    size = {name: row[name] for name in NUMBERS}
    if row["estimate"] < 0:
        size = {"estimate": -row["estimate"], "low": -row["high"], "high": -row["low"]}
    effect = f"{'lowers' if falls else 'raises'} the CLIP-score by {number(size['estimate'], digits)}"
    effect += interval(size, digits) + (" on seeds not used to choose it" if row["fresh"] else "") + share
    rival = "" if missing(row["rival"]) else f"; next best elsewhere {number(row['rival'], digits)}"
    subject = place if row["judged"] else f"the largest effect is that of {place}, which"
    return f"{row['label']}: {subject} {effect}{rival}{_content(row)}."


def _content(row: Mapping[str, Any]) -> str:
    """How the score of what should stay changes at a window, beside what it does at the controls."""
    names = {"content": "", "content_ceiling": "ceiling ", "content_placebo": "placebo "}
    changes = {name: -row[axis] for axis, name in names.items() if not missing(row.get(axis))}
    if "" not in changes:
        return ""
    digits = precision(*changes.values())
    told = [f"{name}{'+' * (value > 0)}{number(value, digits)}" for name, value in changes.items()]
    beside = f" ({', '.join(told[1:])})" if told[1:] else ""
    return f"; the score of what should stay changes by {told[0]}{beside}"


def place_name(start: int, width: int) -> str:
    """`layer 8`, or `the window of 2 layers from 8`."""
    return f"the window of {width} layers from {start}" if width > 1 else f"layer {start}"


def precision(*values: float) -> int:
    """Digits after the point that tell scores of this size apart."""
    return 2 if max((abs(value) for value in values if not missing(value)), default=0) >= 0.095 else 3


def number(value: float, digits: int = 2) -> str:
    """A number for people: a true minus sign, and no minus before zero."""
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and not float(text) else text.replace("-", "−")


def interval(row: Mapping[str, Any], digits: int = 2) -> str:
    """` [low, high]`, or nothing where there is no interval."""
    if missing(row["low"]) or missing(row["high"]):
        return ""
    return f" [{number(row['low'], digits)}, {number(row['high'], digits)}]"


def missing(value: Any) -> bool:
    """Whether a cell of a table is empty: None, NaN or NA."""
    import pandas as pd

    return value is None or bool(pd.isna(value))


def _finding(label: str, lines: dict[int, dict[str, Any]], carrier: Carrier | None, ceiling: Any) -> dict[str, Any]:
    start = None if carrier is None else carrier.start
    at = max(lines, key=lambda place: lines[place]["estimate"]) if start is None else int(start)
    if at not in lines:
        raise LocogenError(f"{label}: its carrier starts at layer {at}, which the effects table does not have")
    row = lines[at]
    given: Any = row.get("width", 1)
    width = carrier.width if carrier is not None else int(given)
    fresh = start is not None and _chosen_apart(lines)
    names = ("fresh", "fresh_low", "fresh_high") if fresh else NUMBERS
    values = [float("nan") if missing(row.get(name)) else float(row[name]) for name in names]
    share = row.get("share")
    if missing(share):
        share = values[0] / ceiling if not missing(ceiling) and ceiling > 0 else float("nan")
    elsewhere = [line[names[0]] for place, line in lines.items() if abs(place - at) >= width]
    return {
        "label": label,
        "concept": row["concept"],
        "kind": row.get("kind", ""),
        "judged": carrier is not None,
        "start": start,
        "at": at,
        "width": width,
        **dict(zip(NUMBERS, values, strict=True)),
        "fresh": fresh,
        "share": share,
        "rival": max(elsewhere, default=float("nan")),
        "reason": "" if carrier is None else carrier.reason,
        "n": row.get("n"),
    }


def _chosen_apart(lines: dict[int, dict[str, Any]]) -> bool:
    """Whether `fresh` comes from other seeds than `choose`: with few seeds both are the same number."""
    pairs: list[tuple[Any, Any]] = [(line.get("choose"), line.get("fresh")) for line in lines.values()]
    if any(missing(value) for pair in pairs for value in pair):
        return False
    return not all(math.isclose(choose, fresh, abs_tol=1e-12) for choose, fresh in pairs)


def _along(effects: Any, axis: str) -> Any:
    """The rows of one axis, with whole positions and a `label` that tells methods and widths apart."""
    rows = effects[(effects["axis"] == axis) & effects["position"].notna()].astype({"position": int})
    if rows.empty:
        there = ", ".join(sorted(set(effects["axis"].astype(str)))) or "nothing"
        raise LocogenError(f"the effects table has no positions along {axis!r}: it has {there}")
    label = rows["concept"].astype(str)
    for column, word in (("method", ""), ("width", "width ")):
        if column in rows and rows.groupby("concept")[column].nunique().max() > 1:
            label = label + " · " + word + rows[column].astype(str)
    rows = rows.assign(label=label)
    if len(twice := rows[rows.duplicated(["label", "position"])]):
        name, start = twice[["label", "position"]].iloc[0]
        raise LocogenError(f"{name}: the effects table has {axis} {start} more than once: give one run's table")
    return rows


def _unedited(table: Any) -> Any:
    return table[table["edit"].isna() | (table["edit"].astype(str) == "")] if "edit" in table else table


def _by_concept(carriers: Carriers, concepts: list[str]) -> Mapping[str, Carrier]:
    if carriers is None:
        return {}
    if isinstance(carriers, Mapping):
        return carriers
    if len(concepts) != 1:
        raise LocogenError(f"one carrier window for {len(concepts)} concepts: give a dict, concept → Window")
    return {concepts[0]: carriers}


def describe_edit(summary: pd.DataFrame, arm: str) -> str:
    """What one arm of `locogen.editing.evaluation.summary` did, in a sentence, beside the best of the others."""
    rows = summary[summary["quantity"] == "right"].set_index(["arm", "measure"])
    own = {measure: rows.loc[(arm, measure)] for a, measure in rows.index if a == arm}
    names = {"efficacy": "of its own prompts", "generality": "said in other words", "specificity": "of its neighbors"}
    told = [
        f"{_percent(row['after'])} {names[measure]} ({_percent(row['before'])} before)" for measure, row in own.items()
    ]
    text = f"With the edit at {arm}, the picture shows what the prompt says for {', '.join(told)}."
    rivals = rows[rows.index.get_level_values("arm") != arm]
    if "efficacy" not in own or "specificity" not in own or rivals.empty:
        return text
    gained: Any = rows["change"] * rows["sign"]
    score = gained.unstack("measure")[["efficacy", "specificity"]].sum(axis=1)
    mine, score = float(score[arm]), score.drop(arm)
    best = str(score.idxmax())
    verb = "more" if mine > score.max() else "no more"
    moved = " and ".join(_percent(rows.loc[(best, measure), "after"]) for measure in ("efficacy", "specificity"))
    return f"{text} It tells concept and neighbors apart {verb} than the best control, {best} ({moved})."


def _percent(share: float) -> str:
    return f"{number(100 * share, 0)} %"
