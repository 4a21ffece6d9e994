"""Plots for other localizers than LocoGen: a causal trace, profiles of several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.errors import LocogenError
from locogen.views.plots import axes_for, draw_heatmap, draw_star, figure_size, plain_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LABEL = "score brought back (cosine)"
MOST_TICKS = 16
STYLES = (("o-", "#0173b2"), ("s--", "#b35900"), ("^:", "#4a7d3c"), ("D-.", "#8a5a9e"))


def trace_matrix(effects: pd.DataFrame, *, text: bool) -> pd.DataFrame:
    """Estimates of one concept's causal trace, (parts, layers), of one side of the model.

    Raises `LocogenError` for several concepts, or a trace without states of that side.
    """
    rows: Any = effects[effects["position"].notna()]
    # Parts of the text encoder are named "text MLP, last" and the like.
    rows = rows[rows["axis"].str.startswith("text ") == text]
    if rows.empty or rows["concept"].nunique() != 1:
        side = "text encoder" if text else "denoiser"
        raise LocogenError(
            f"the table has no trace of one concept's {side}: "
            "give trace_effect(run.table) of one run"
        )
    matrix = rows.astype({"position": int}).pivot(
        index="axis", columns="position", values="estimate"
    )
    return matrix.reindex(index=list(dict.fromkeys(rows["axis"]))).astype(float)


def plot_trace(effects: pd.DataFrame, *, text: bool = False, ax: Axes | None = None) -> Axes:
    """Draw a heatmap of a causal trace, states × layers, on one scale for both sides of the model.

    Args:
        effects: The effects table of one concept, from `trace_effect`.
        text: Whether to draw the text encoder's states; otherwise the denoiser's.
        ax: Where to draw; None: a new figure.

    Returns:
        The axes that were drawn on; the state that brings back most is starred.

    Raises:
        LocogenError: For several concepts, or a trace without states of that side.

    Example:
        >>> import pandas as pd
        >>> sizes = [{"position": 3, "estimate": 0.1}, {"position": 8, "estimate": 0.4}]
        >>> effects = pd.DataFrame(sizes).assign(concept="neon", axis="cross-attention")
        >>> ax = plot_trace(effects)
        >>> [text.get_text() for text in ax.get_xticklabels()]
        ['3', '8']
    """
    matrix = trace_matrix(effects, text=text)
    every: Any = effects.loc[effects["position"].notna(), "estimate"]
    width, height = figure_size(matrix)
    ax = axes_for(ax, (max(width, 6.0), height))
    # The scale holds zero and the states of both sides, so that two plots can be compared.
    low = min(0.0, every.min())
    high = max(0.0, every.max(), 1e-9)
    draw_heatmap(matrix, LABEL, ax, cmap="vlag", center=0, vmin=low, vmax=high)
    columns = [str(column) for column in matrix.columns]
    rows = [plain_label(name.removeprefix("text "), 30) for name in matrix.index]
    # More numbers would touch each other.
    step = math.ceil(len(columns) / MOST_TICKS)
    places = [place + 0.5 for place in range(0, len(columns), step)]
    ax.set_xticks(places, columns[::step], rotation=0)
    ax.set_yticks([place + 0.5 for place in range(len(rows))], rows, rotation=0)
    ax.set(xlabel="layer, among those of its kind (execution order)", ylabel="")
    ax.tick_params(length=0)
    values = matrix.to_numpy()  # (parts, layers); NaN where a part has fewer layers
    row, column = np.unravel_index(np.nanargmax(values), values.shape)
    draw_star(ax, int(row), int(column))
    return ax


def profiles(effects: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Each localizer's estimates by layer, divided by its largest one.

    A long table: `method at value low high`; `at` is the middle of a window. Raises `LocogenError`
    for a table without layers, or without any positive estimate.
    """
    import pandas as pd

    parts = []
    for method, table in effects.items():
        on_layers = table["axis"].isin(["layer", "cross-attention"])
        rows: Any = table[on_layers].astype({"position": int})
        # Methods measure in different units: only the shape of their profiles can be compared.
        largest = rows["estimate"].max() if len(rows) else 0
        if not largest > 0:
            raise LocogenError(
                f"{method} has no layer with a positive effect, so there is no profile to draw: "
                "leave it out"
            )
        columns = {
            "method": method,
            "at": rows["position"] + (rows["width"] - 1) / 2,
            "value": rows["estimate"] / largest,
            "low": rows["low"] / largest,
            "high": rows["high"] / largest,
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def plot_profiles(effects: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Draw several localizers' effects by layer, each divided by its largest one.

    Args:
        effects: Name of a localizer → its effects table of one concept.
        ax: Where to draw; None: a new figure.

    Returns:
        The axes that were drawn on, one line a localizer.

    Raises:
        LocogenError: For a table without layers, or without any positive effect.

    Example:
        >>> import pandas as pd
        >>> sizes = [{"position": 3, "estimate": 0.1}, {"position": 8, "estimate": 0.4}]
        >>> effects = pd.DataFrame(sizes).assign(axis="layer", width=1, low=0.0, high=0.5)
        >>> ax = plot_profiles({"LocoGen": effects})
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['LocoGen']
    """
    table: Any = profiles(effects)
    ax = axes_for(ax, (7.5, 3.8))
    ax.axhline(0, color="0.35", linewidth=0.8)
    for place, (method, rows) in enumerate(table.groupby("method", sort=False)):
        style, color = STYLES[place % len(STYLES)]
        below = (rows["value"] - rows["low"]).clip(lower=0).fillna(0)
        above = (rows["high"] - rows["value"]).clip(lower=0).fillna(0)
        at = rows["at"] + 0.08 * (place - 1)  # so that profiles do not hide each other
        looks = {"fmt": style, "color": color, "capsize": 2, "markersize": 4}
        ax.errorbar(at, rows["value"], yerr=np.stack([below, above]), label=str(method), **looks)
    last = int(table["at"].max() + 1)
    ax.set_xticks(range(0, last + 1, 1 if last <= 20 else 5))
    # Wide intervals may leave the axes: the estimates count.
    bottom = max(-1.0, table["low"].min()) - 0.05
    top = min(2.5, table["high"].max()) + 0.05
    ax.set_ylim(bottom, top)
    ax.set_xlabel("layer, or the middle of the window (execution order)")
    ax.set_ylabel("effect, of its own largest")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
