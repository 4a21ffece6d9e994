"""Localizers on planted models: their scores in words, named places against the planted ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.benchmarks.answers import NAMING
from locogen.benchmarks.scores import SETTING, places_of
from locogen.errors import LocogenError
from locogen.markup import interval_text
from locogen.views.plots import axes_for, plain_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Measures in a table's heading.
HEADINGS: Mapping[str, str] = {
    "right_kind": "right kind",
    "hit": "hit",
    "complete": "every place",
    "off_by_one": "off by one",
    "elsewhere": "place elsewhere",
    "false_single": "false single place",
    "inconclusive": "inconclusive",
    "auroc": "AUROC",
    "cpr": "CPR",
    "cmd": "CMD",
    "coverage": "coverage",
    "coverage_near": "coverage, near zero",
    "right_side": "right side",
    "wrong_side": "wrong side",
}
PLANTED = "#f0c75e"  # dark and light enough to be seen under bars of any color
COLORS = ("#0173b2", "#b35900", "#4a7d3c", "#8a5a9e", "#7a4b3a", "#5a5a5a", "#a0a0a0", "#c2185b")
MARKERS = "os^DvPX*"
SHORT_KINDS = {"spread": "spread", "nobody": "nobody", "inconclusive": "?"}


# --- tables --------------------------------------------------------------------------------------


def score_table(scores: pd.DataFrame, measures: Sequence[str] = ()) -> pd.DataFrame:
    """Lay out a benchmark's scores: a line for each localizer, a column for each measure.

    Args:
        scores: From `Benchmark.scores()` or `Benchmark.by_rule()`.
        measures: Names of measures, in the order of the columns; empty: all that there are.

    Returns:
        Texts such as "0.92 [0.65, 0.99]", "–" where a measure does not apply; those that apply to
        no answer are left out. The index has the localizers and, of settings and rules, those of
        which there are several.

    Raises:
        LocogenError: For a measure of another name.

    Example:
        >>> import pandas as pd
        >>> line = {"localizer": "mine", "window": 2, "measure": "hit", "value": 1.0}
        >>> table = score_table(pd.DataFrame([line | {"low": 0.51, "high": 1.0}]))
        >>> table.loc["mine", "hit"]
        '1.00 [0.51, 1.00]'
    """
    unknown = [name for name in measures if name not in HEADINGS]
    if unknown:
        raise LocogenError(f"there is no measure {unknown[0]!r}: use some of {', '.join(HEADINGS)}")
    there = set(scores["measure"])
    columns = list(measures) or [name for name in HEADINGS if name in there]
    index = ["localizer"]
    for name in (*SETTING, "rule"):
        if name in scores and len(set(scores[name].dropna())) > 1:
            index.append(name)
    lines = scores.assign(text=_interval_texts(scores))
    wide: Any = lines.pivot_table(
        index=index, columns="measure", values="text", aggfunc="first", sort=False
    )
    wide = _without_empty(wide.reindex(columns=columns)).astype(object).fillna("–")
    return wide.rename(columns=HEADINGS).rename_axis(columns=None)


def _without_empty(wide: Any) -> Any:
    """The columns that hold something, or all if none does."""
    return wide.dropna(axis="columns", how="all") if wide.notna().any(axis=None) else wide


def _interval_texts(scores: pd.DataFrame) -> list[str]:
    rows: Any = scores[["value", "low", "high"]].to_numpy()
    return [interval_text(value, low, high) for value, low, high in rows]


def named_layers(table: pd.DataFrame) -> pd.DataFrame:
    """Which layers each answer names: one row an answer and place, or an answer without a place.

    Columns: plant, planted (layers), localizer, concept, kind, first, last (NaN without a place).
    """
    import pandas as pd

    rows = []
    for line in table.to_dict("records"):
        row = {name: line[name] for name in ("plant", "localizer", "concept", "kind")}
        row["planted"] = tuple(layer for place in places_of(line["planted"]) for layer in place)
        places = places_of(line["places"]) if line["kind"] in NAMING else ()
        for place in places:
            layers = list(place)
            rows.append(row | {"first": layers[0], "last": layers[-1]})
        if not places:
            rows.append(row | {"first": math.nan, "last": math.nan})
    return pd.DataFrame(rows)


def share_points(table: pd.DataFrame) -> pd.DataFrame:
    """Answers that give a share of the ceiling to one planted place: what was planted, and it.

    Columns: localizer, plant, concept, strength, share, share_low, share_high.
    """
    answers: Any = table
    is_place = (table["rule"] == "one place") & table["scored"] & table["share"].notna()
    columns = ["localizer", "plant", "concept", "strength", "share", "share_low", "share_high"]
    return answers.loc[is_place, columns].astype({"share": float}).reset_index(drop=True)


# --- plots ---------------------------------------------------------------------------------------


def plot_places(table: pd.DataFrame, *, columns: int = 3) -> Figure:
    """Draw the places that localizers name against the planted ones: a panel for each model.

    Layers run across, planted ones are shaded; each localizer has a row, each concept a bar in it.
    Where no place is named, the answer stands at the left: "nobody", "spread", "?" (inconclusive).

    Args:
        table: The table of a `Benchmark`, of one setting.
        columns: Panels side by side.

    Returns:
        The figure.

    Raises:
        LocogenError: For a table of several settings, or an empty one.

    Example:
        >>> import pandas as pd
        >>> answer = {"plant": "early", "planted": "0-1", "localizer": "mine", "concept": "neon"}
        >>> answer |= {"kind": "one place", "places": "0-1", "n_layers": 16, "rule": "one place"}
        >>> settings = {"window": 2, "guidance_scale": 7.5, "prompts": 2, "seeds": 4}
        >>> figure = plot_places(pd.DataFrame([answer | settings]))
        >>> [ax.get_title(loc="left") for ax in figure.axes]
        ['early']
    """
    import matplotlib.pyplot as plt

    if table.empty:
        raise LocogenError("the benchmark has no answers: there is nothing to draw")
    if len(table[list(SETTING)].drop_duplicates()) > 1:
        raise LocogenError("the answers are of several settings: select one, and draw each apart")
    layers: Any = named_layers(table)
    plants = list(dict.fromkeys(table["plant"]))
    localizers = list(dict.fromkeys(table["localizer"]))
    columns = min(columns, len(plants))
    rows = math.ceil(len(plants) / columns)
    figure, grid = plt.subplots(
        *(rows, columns),
        figsize=(1.3 + 3.4 * columns, 0.5 + rows * (0.7 + 0.27 * len(localizers))),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    last = max(table["n_layers"].astype(int)) - 1
    for ax, plant in zip(grid.flat, plants, strict=False):
        _draw_plant(ax, layers[layers["plant"] == plant], localizers)
        ax.set_title(plain_label(plant, 40), loc="left", fontsize=9)
    for ax in grid.flat[len(plants) :]:
        ax.remove()
    corner = grid[0, 0]
    corner.set_xlim(-0.5, last + 0.5)
    corner.set_xticks(range(0, last + 1, 2 if last <= 20 else 5))
    corner.set_ylim(len(localizers) - 0.5, -0.5)
    corner.set_yticks(range(len(localizers)), localizers)
    figure.supxlabel("layer (execution order); shaded: planted", fontsize=9)
    return figure


def _draw_plant(ax: Axes, layers: Any, localizers: Sequence[str]) -> None:
    """The planted layers, and for each localizer a bar for each concept and place."""
    for layer in layers["planted"].iloc[0]:
        ax.axvspan(layer - 0.5, layer + 0.5, color=PLANTED, linewidth=0, zorder=0)
    concepts = list(dict.fromkeys(layers["concept"]))
    height = 0.8 / len(concepts)
    for line in layers.itertuples():
        row = localizers.index(line.localizer)
        middle = row - 0.4 + height * (concepts.index(line.concept) + 0.5)
        if math.isnan(line.first):
            text: dict[str, Any] = {"va": "center", "ha": "left", "fontsize": 5.5, "color": "0.25"}
            ax.text(-0.4, middle, SHORT_KINDS.get(str(line.kind), str(line.kind)), **text)
            continue
        bar: dict[str, Any] = {"height": 0.8 * height, "color": COLORS[row % len(COLORS)]}
        ax.barh(middle, line.last - line.first + 1, left=line.first - 0.5, **bar)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, length=2)


def plot_shares(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the share that localizers give to a planted place against the share that was planted.

    Args:
        table: The table of a `Benchmark`.
        ax: Where to draw; None: a new figure.

    Returns:
        The axes: a point for each answer, with its interval where it has one.

    Raises:
        LocogenError: If no answer gives a share.

    Example:
        >>> import pandas as pd
        >>> answer = {"localizer": "mine", "plant": "half", "concept": "neon", "strength": 0.5}
        >>> answer |= {"rule": "one place", "scored": True, "share": 0.4}
        >>> ax = plot_shares(pd.DataFrame([answer | {"share_low": 0.3, "share_high": 0.5}]))
        >>> ax.get_xlabel()
        'planted: share of training rows in which the place got the true value'
    """
    points: Any = share_points(table)
    if points.empty:
        raise LocogenError("no answer gives a share to a planted place: there is nothing to draw")
    ax = axes_for(ax, (6.4, 4.2))
    ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8, linestyle="--", zorder=0)
    groups: Any = points.groupby("localizer", sort=False)
    for place, (localizer, rows) in enumerate(groups):
        # Side by side, so that answers of equal strength do not hide each other.
        steps = np.arange(len(rows)) % 5
        at = rows["strength"] + 0.02 * (place - (len(groups) - 1) / 2) + 0.002 * steps
        ends = rows[["share_low", "share_high"]].astype(float)
        below = (rows["share"] - ends["share_low"]).clip(lower=0).fillna(0)
        above = (ends["share_high"] - rows["share"]).clip(lower=0).fillna(0)
        looks: dict[str, Any] = {
            "fmt": MARKERS[place % len(MARKERS)],
            "color": COLORS[place % len(COLORS)],
        }
        looks |= {"capsize": 2, "markersize": 4, "linewidth": 1, "alpha": 0.85}
        ax.errorbar(at, rows["share"], yerr=np.stack([below, above]), label=str(localizer), **looks)
    ax.set_xlim(-0.05, 1.1)
    # Wide intervals may leave the axes: the shares count.
    shares = points["share"]
    ax.set_ylim(min(-0.1, shares.min() - 0.1), max(1.3, min(2.5, shares.max() + 0.1)))
    ax.set_xlabel("planted: share of training rows in which the place got the true value")
    ax.set_ylabel("share of the ceiling's effect")
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def describe_benchmark(scores: pd.DataFrame) -> str:
    """Say in a sentence for each measure how the localizers did.

    Args:
        scores: From `Benchmark.scores()`, of one setting.

    Returns:
        Sentences: the right kind of answer and false single places, or else places hit; with
        intervals, localizers that score alike together.

    Example:
        >>> import pandas as pd
        >>> line = {"measure": "hit", "value": 1.0, "low": 0.51, "high": 1.0, "plants": 4}
        >>> names = pd.DataFrame([line | {"localizer": "mine"}, line | {"localizer": "yours"}])
        >>> describe_benchmark(names)
        'Hit: 1.00 [0.51, 1.00] mine, yours (4 models).'
    """
    measures = [name for name in ("right_kind", "false_single") if name in set(scores["measure"])]
    sentences = []
    for measure in measures or ["hit"]:
        of_measure: Any = scores[scores["measure"] == measure]
        rows = of_measure.drop_duplicates("localizer")
        if rows.empty:
            continue
        alike: dict[str, list[str]] = {}
        for line in rows.to_dict("records"):
            text = interval_text(line["value"], line["low"], line["high"])
            alike.setdefault(text, []).append(line["localizer"])
        parts = [f"{text} {', '.join(names)}" for text, names in alike.items()]
        plants = int(rows["plants"].max())
        count = "1 model" if plants == 1 else f"{plants} models"
        sentences.append(f"{HEADINGS[measure].capitalize()}: {'; '.join(parts)} ({count}).")
    return " ".join(sentences) or "No localizer has a score."
