"""Tables in, matplotlib `Axes` out: the heatmaps, curves and strips of pictures, and the same in a sentence.

Each plot draws what a small function of `locogen.views.tables` computes, so that what is drawn can be tested.
Nothing here needs torch or a model: saved tables are enough.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.views.tables import (
    Carriers,
    carrier_cells,
    curves,
    describe,
    effect_matrix,
    missing,
    number,
    precision,
    score_matrix,
    strip_rows,
    timesteps_matrix,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = [
    "describe",
    "figure_size",
    "plot_curve",
    "plot_effect",
    "plot_scores",
    "plot_strip",
    "plot_timesteps",
    "strip_rows",
]

START_LABEL = "window start (layer, execution order)"
CHANGE_LABEL = "change of CLIP-score (cosine)"
SCORE_LABEL = "mean CLIP-score (cosine)"
ANNOTATED_COLUMNS = 20
SMALL_PICTURE = 128  # pixels: up to here a picture is enlarged square by square


def plot_effect(
    effects: pd.DataFrame,
    *,
    axis: str = "layer",
    carriers: Carriers = None,
    layer_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Heatmap of the effect of each window, concepts × window starts, on one scale around zero.

    Positive means "carries the concept". `axis`: "layer" (what replacing the window takes away), "insert"
    (what it brings alone) or "content". `carriers`: concept → `Window`, or one `Window` for a table of one
    concept; its cell is outlined and starred. `layer_names`: in execution order, for the ticks.
    """
    matrix = effect_matrix(effects, axis=axis)
    low, high = min(0.0, matrix.min().min()), max(0.0, matrix.max().max())
    high = high if high > low else 1.0
    ax = _heatmap(matrix, CHANGE_LABEL, ax, cmap="vlag", center=0, vmin=low, vmax=high)
    cells = carrier_cells(effects, carriers, axis=axis)
    names = [_plain(name) + "\n(no single window)" * (cells.get(name, 0) is None) for name in matrix.index]
    _finish(ax, matrix, names, layer_names)
    for label, start in cells.items():
        if start is not None and start in matrix.columns:
            _mark(ax, list(matrix.index).index(label), list(matrix.columns).index(start))
    if any(start is not None for start in cells.values()):
        ax.set_title("★ outlined: the carrier window", loc="left", fontsize=9)
    return ax


def plot_timesteps(
    effects: pd.DataFrame,
    concept: str | None = None,
    *,
    layer_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Heatmap of one concept's windows by when they hear the target: spans of denoising steps × window starts.

    On one scale around zero; positive means "carries the concept then". Steps count from 0, the noisiest.
    """
    matrix = timesteps_matrix(effects, concept)
    low, high = min(0.0, matrix.min().min()), max(0.0, matrix.max().max())
    ax = _heatmap(matrix, CHANGE_LABEL, ax, cmap="vlag", center=0, vmin=low, vmax=high if high > low else 1.0)
    _finish(ax, matrix, list(matrix.index), layer_names)
    ax.set_ylabel("heard at")
    return ax


def plot_scores(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Heatmap of the mean raw CLIP-score, concepts × window starts, controls set apart, on one scale."""
    matrix = score_matrix(table)
    ax = _heatmap(matrix, SCORE_LABEL, ax, cmap="mako")
    _finish(ax, matrix, [_plain(name) for name in matrix.index], None)
    return ax


def plot_curve(effects: pd.DataFrame, concept: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Effect by window start with 95 % intervals, for one concept; ceiling and placebo as bands across."""
    found = curves(effects, concept)
    ax = _axes(ax, (7.5 if len(found.get("layer", [])) <= ANNOTATED_COLUMNS else 13.0, 4.0))
    ax.axhline(0, color="0.35", linewidth=0.8)
    if "layer" in found:
        _series(ax, found["layer"], -0.07, "window: what replacing it takes away", "o-", "#0173b2")
    if "insert" in found:
        _series(ax, found["insert"], 0.07, "insert: what it brings alone", "s--", "#b35900")
    bands = sorted(set(found) & {"ceiling", "placebo"}, key=lambda axis: found[axis][0]["estimate"])
    for place, axis in enumerate(bands):
        _band(ax, axis, found[axis][0], above=place == len(bands) - 1)
    starts = sorted({int(row["position"]) for axis in {"layer", "insert"} & set(found) for row in found[axis]})
    ax.set_xticks(starts[:: 1 if len(starts) <= ANNOTATED_COLUMNS else 5])
    ax.set_xlabel(START_LABEL)
    ax.set_ylabel(CHANGE_LABEL)
    ax.set_title(_plain(next(iter(found.values()))[0]["concept"], 60), loc="left", pad=24)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_strip(
    pictures: Sequence[Image.Image],
    labels: Sequence[str],
    *,
    columns: int | None = None,
    marked: Iterable[int] = (),
    zoom: float | None = None,
    fig: Figure | None = None,
) -> Figure:
    """Pictures in rows with a label under each; those whose index is in `marked` are framed and starred.

    `zoom`: pixels of the figure for one of the picture, at 100 per inch; by default pictures are 130 wide.
    Small pictures are enlarged square by square, so that every pixel is seen as it is.
    """
    if len(pictures) != len(labels) or not pictures:
        raise LocogenError(f"{len(pictures)} pictures and {len(labels)} labels: give one label a picture, at least one")
    import matplotlib.pyplot as plt

    columns = min(columns or 8, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    wide = width * (zoom or 130 / width) / 100
    texts = [_plain(label, max(8, int(wide * 11))) for label in labels]
    lines = max(text.count("\n") + 1 for text in texts)
    size = (columns * (wide + 0.12) + 0.1, rows * (wide * height / width + 0.2 + 0.15 * lines) + 0.1)
    fig = fig or plt.figure(figsize=size, layout="constrained")
    framed = set(marked)
    for place, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        cell = fig.add_subplot(rows, columns, place + 1)
        cell.imshow(picture, interpolation="nearest" if max(picture.size) <= SMALL_PICTURE else None)
        cell.set(xticks=[], yticks=[])
        cell.set_xlabel(f"★ {text}" if place in framed else text, fontsize=8, labelpad=3, linespacing=1.1)
        for spine in cell.spines.values():
            spine.set(visible=place in framed, linewidth=3, edgecolor="black")
    return fig


_MEASURES = {
    "efficacy": ("o", "#b2182b"),
    "generality": ("s", "#e08214"),
    "specificity": ("D", "#2166ac"),
    "ordinary": ("^", "#4d4d4d"),
}
_QUANTITIES = {
    "right": "share of pictures that show what the prompt says",
    "score": "mean CLIP-score (cosine)",
    "ssim": "likeness to the unedited picture (SSIM)",
    "distance": "distance of the scorer's features (1 - cosine)",
    "lpips": "perceptual distance (LPIPS)",
}


def plot_evaluation(
    summary: pd.DataFrame, *, quantity: str = "right", marked: str | None = None, ax: Axes | None = None
) -> Axes:
    """What each arm of `editing.evaluation.summary` did: filled marks after, hollow ones before, with intervals.

    One line an arm, one mark a measure: efficacy should go (come, for a fact's new answer), specificity stay.
    `quantity`: right, score, ssim, distance or lpips. `marked`: the arm to point out. Raises `LocogenError` where the
    table has no such quantity.
    """
    rows: Any = summary[summary["quantity"] == quantity]
    if rows.empty:
        known = ", ".join(dict.fromkeys(summary["quantity"]))
        raise LocogenError(f"the summary has no quantity {quantity!r}: it has {known}")
    arms = list(dict.fromkeys(rows["arm"]))
    ax = _axes(ax, (7.5, 1.4 + 0.36 * len(arms)))
    measures = [name for name in _MEASURES if (rows["measure"] == name).any()]
    shifts = {name: 0.22 * (i - (len(measures) - 1) / 2) for i, name in enumerate(measures)}
    for measure in measures:
        marker, color = _MEASURES[measure]
        part = rows[rows["measure"] == measure]
        at = [arms.index(arm) + shifts[measure] for arm in part["arm"]]
        after = part["after"].to_numpy(float)
        spread = [
            (after - part["after_low"]).clip(lower=0).fillna(0),
            (part["after_high"] - after).clip(lower=0).fillna(0),
        ]
        if part["before"].notna().any():
            ax.plot(part["before"], at, marker, mfc="none", mec=color, alpha=0.6, markersize=5)
        ax.errorbar(after, at, xerr=spread, fmt=marker, color=color, capsize=2, markersize=5, label=measure)
    ax.set_yticks(range(len(arms)), [_plain(f"{arm} ★" if arm == marked else arm, 34) for arm in arms])
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.set_xlabel(_QUANTITIES.get(quantity, quantity))
    ax.grid(axis="x", alpha=0.3)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    return ax


def figure_size(matrix: pd.DataFrame) -> tuple[float, float]:
    """Inches for a heatmap of this shape: room for the numbers in the cells, the names and the color bar."""
    rows, columns = matrix.shape
    cell = 0.5 if columns <= ANNOTATED_COLUMNS else 0.17
    return 2.4 + cell * columns, (1.3 if rows > 3 else 1.9) + 0.45 * rows


def _plain(text: Any, width: int = 26) -> str:
    """A label as it is written: wrapped, cut after three lines, with dollars that start no formula."""
    lines = (textwrap.wrap(line, width) for line in str(text).splitlines())
    kept = [part for line in lines for part in line] or [""]
    if len(kept) > 3:
        kept = [*kept[:2], kept[2][: width - 2] + " …"]
    return "\n".join(kept).replace("$", r"\$")


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def _heatmap(matrix: pd.DataFrame, label: str, ax: Axes | None, **colors: Any) -> Axes:
    """One scale for all rows, no clipping of extremes; ticks and marks are drawn by the caller."""
    import seaborn as sns

    ax = _axes(ax, figure_size(matrix))
    colors |= dict(cbar_kws=_colorbar(matrix, label), robust=False, linewidths=0.5, linecolor="white")
    return sns.heatmap(matrix, ax=ax, xticklabels=False, yticklabels=False, **colors, **_annotation(matrix))


def _annotation(matrix: pd.DataFrame) -> dict[str, Any]:
    """Numbers in the cells, as many digits as tell them apart, up to 20 columns."""
    if matrix.shape[1] > ANNOTATED_COLUMNS:
        return {}
    digits = precision(matrix.abs().max().max())
    return dict(annot=matrix.map(lambda value: number(value, digits)), fmt="", annot_kws={"size": 8})


def _colorbar(matrix: pd.DataFrame, label: str) -> dict[str, Any]:
    """Beside the heatmap, or below where that would be too short for its label."""
    if len(matrix) > 3:
        return dict(label=label, pad=0.02, aspect=30)
    return dict(label=label, location="bottom", shrink=0.5, aspect=40, pad=0.05)


def _finish(ax: Axes, matrix: pd.DataFrame, names: list[str], layer_names: Sequence[str] | None) -> None:
    columns = list(matrix.columns)
    step = 1 if len(columns) <= ANNOTATED_COLUMNS or layer_names is not None else 5
    shown = [place for place, column in enumerate(columns) if not isinstance(column, int) or column % step == 0]
    ticks = [_tick(columns[place], layer_names) for place in shown]
    ax.set_xticks([place + 0.5 for place in shown], ticks, rotation=0)
    for text in ax.get_xticklabels():
        if not text.get_text().isdigit():
            text.set(
                rotation=90 if layer_names is not None else 40,
                ha="right",
                va="center",
                rotation_mode="anchor",
            )
    ax.set_yticks([row + 0.5 for row in range(len(names))], names, rotation=0)
    ax.set_xlabel(START_LABEL)
    ax.set_ylabel("")
    ax.tick_params(length=0)


def _tick(column: Any, layer_names: Sequence[str] | None) -> str:
    if layer_names is None or not isinstance(column, int) or column >= len(layer_names):
        return str(column)
    return f"{layer_names[column]}  {column}".replace("$", r"\$")


def _mark(ax: Axes, row: int, column: int) -> None:
    """Outline one cell and put a star in its corner."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=2.2, clip_on=False, zorder=5))
    ax.plot(
        column + 0.84,
        row + 0.22,
        "*",
        markersize=9,
        color="black",
        markeredgecolor="white",
        mew=0.6,
        zorder=6,
    )


def _series(ax: Axes, rows: list[dict[str, Any]], shift: float, label: str, style: str, color: str) -> None:
    """Points with 95 % intervals, a little aside so that two series do not hide each other."""
    at = [int(row["position"]) + shift for row in rows]
    values = [float(row["estimate"]) for row in rows]
    spread = [
        [
            0.0 if missing(row[end]) else max(0.0, sign * (float(row[end]) - value))
            for row, value in zip(rows, values, strict=True)
        ]
        for end, sign in (("low", -1), ("high", 1))
    ]
    ax.errorbar(at, values, yerr=spread, fmt=style, color=color, label=label, capsize=2.5, markersize=5)


def _band(ax: Axes, name: str, row: dict[str, Any], *, above: bool) -> None:
    """A horizontal band over the interval of a control, with its name at the right end."""
    color = {"ceiling": "#555555", "placebo": "#8a5a9e"}[name]
    estimate = float(row["estimate"])
    if not missing(row["low"]) and not missing(row["high"]):
        ax.axhspan(float(row["low"]), float(row["high"]), color=color, alpha=0.15, linewidth=0)
    ax.axhline(estimate, color=color, linestyle="-." if name == "ceiling" else ":", linewidth=1.4)
    end = ax.get_yaxis_transform()
    ax.text(1.01, estimate, name, transform=end, color=color, va="bottom" if above else "top", fontsize=9)
