"""Plots for localizers beside LocoGen: the heatmap of a causal trace, and profiles of several localizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.errors import LocogenError
from locogen.views.plots import _annotation, _axes, _colorbar, _plain, figure_size

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LABEL = "score brought back (cosine)"
STYLES = (("o-", "#0173b2"), ("s--", "#b35900"), ("^:", "#4a7d3c"), ("D-.", "#8a5a9e"))


def trace_matrix(effects: pd.DataFrame, *, text: bool) -> pd.DataFrame:
    """Estimates of one concept's causal trace, (parts, layers): of the text encoder, or of the denoiser.

    Raises `LocogenError` for several concepts, or a trace without states of that side.
    """
    rows: Any = effects[effects["position"].notna()]
    rows = rows[rows["axis"].str.startswith("text ") == text]
    if rows.empty or rows["concept"].nunique() != 1:
        side = "text encoder" if text else "denoiser"
        raise LocogenError(f"there is no trace of one concept's {side} here: give trace_effect(run.table) of one run")
    matrix = rows.astype({"position": int}).pivot(index="axis", columns="position", values="estimate")
    return matrix.reindex(index=list(dict.fromkeys(rows["axis"]))).astype(float)


def plot_trace(effects: pd.DataFrame, *, text: bool = False, ax: Axes | None = None) -> Axes:
    """Heatmap of a causal trace, states × layers, on one scale around zero for both sides of the model.

    `text`: the text encoder's states, else the denoiser's. The state that brings back most is starred.
    """
    import seaborn as sns

    matrix = trace_matrix(effects, text=text)
    every: Any = effects.loc[effects["position"].notna(), "estimate"]
    low, high = min(0.0, every.min()), max(0.0, every.max(), 1e-9)
    ax = _axes(ax, _size(matrix))
    sns.heatmap(
        matrix, ax=ax, cmap="vlag", center=0, vmin=low, vmax=high, robust=False, linewidths=0.5, linecolor="white",
        xticklabels=False, yticklabels=False, cbar_kws=_colorbar(matrix, LABEL), **_annotation(matrix),
    )  # fmt: skip
    columns, rows = list(matrix.columns), [_plain(name.removeprefix("text "), 30) for name in matrix.index]
    ax.set_xticks([place + 0.5 for place in range(len(columns))], [str(column) for column in columns], rotation=0)
    ax.set_yticks([place + 0.5 for place in range(len(rows))], rows, rotation=0)
    ax.set(xlabel="layer, among those of its kind (execution order)", ylabel="")
    ax.tick_params(length=0)
    row, column = np.unravel_index(np.nanargmax(matrix.to_numpy()), matrix.shape)
    ax.plot(column + 0.84, row + 0.22, "*", markersize=9, color="black", markeredgecolor="white", mew=0.6, zorder=6)
    return ax


def _size(matrix: pd.DataFrame) -> tuple[float, float]:
    wide, high = figure_size(matrix)
    return max(wide, 6.0), high


def profiles(effects: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Each localizer's estimates by layer, divided by its largest, so that they can be drawn together.

    A long table: `method at value low high`; `at` is the middle of a window. Raises `LocogenError` for a table without
    layers, or without any positive estimate.
    """
    import pandas as pd

    parts = []
    for method, table in effects.items():
        rows: Any = table[table["axis"].isin(["layer", "cross-attention"])].astype({"position": int})
        most = rows["estimate"].max() if len(rows) else 0
        if not most > 0:
            raise LocogenError(f"{method} has no layer with a positive effect: there is no profile to draw")
        ends = {name: rows[name] / most for name in ("low", "high")}
        value = rows["estimate"] / most
        parts.append(
            pd.DataFrame({"method": method, "at": rows["position"] + (rows["width"] - 1) / 2, "value": value, **ends})
        )
    return pd.concat(parts, ignore_index=True)


def plot_profiles(effects: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """What several localizers say of each layer, each against its own largest effect, with 95 % intervals."""
    table: Any = profiles(effects)
    ax = _axes(ax, (7.5, 3.8))
    ax.axhline(0, color="0.35", linewidth=0.8)
    for place, (method, rows) in enumerate(table.groupby("method", sort=False)):
        style, color = STYLES[place % len(STYLES)]
        spread = [
            (rows["value"] - rows["low"]).clip(lower=0).fillna(0),
            (rows["high"] - rows["value"]).clip(lower=0).fillna(0),
        ]
        at = rows["at"] + 0.08 * (place - 1)
        ax.errorbar(at, rows["value"], yerr=spread, fmt=style, color=color, capsize=2, markersize=4, label=str(method))
    last = int(table["at"].max() + 1)
    ax.set_xticks(range(0, last + 1, 1 if last <= 20 else 5))
    ax.set_ylim(max(-1.0, table["low"].min()) - 0.05, min(2.5, table["high"].max()) + 0.05)
    ax.set(xlabel="layer, or the middle of the window (execution order)", ylabel="effect, of its own largest")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
