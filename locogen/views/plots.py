"""Tables in, matplotlib `Axes` out: heatmaps, curves and strips of pictures.

Each plot draws what a small function of `locogen.views.tables` computes, so that what is drawn can
be tested. Nothing here needs torch or a model: saved tables are enough.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.errors import LocogenError
from locogen.markup import number, precision
from locogen.views.tables import (
    Carriers,
    carrier_cells,
    carrier_notes,
    curves,
    describe,
    effect_matrix,
    measure_label,
    missing,
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
# What effects are measured by, and in what units, for the axes of effects.
SCORES = {"clip_score": ("CLIP-score", "cosine"), "probability": ("probability", "among neighbors")}
SCORE_LABEL = "mean CLIP-score (cosine)"
ANNOTATED_COLUMNS = 20  # with more columns, numbers do not fit into the cells
SMALL_PICTURE = 128  # pixels: up to here a picture is enlarged square by square
LABEL_LINES = 3
# matplotlib's and seaborn's are imported inside the functions: importing locogen stays quick.


def plot_effect(
    effects: pd.DataFrame,
    *,
    axis: str = "layer",
    carriers: Carriers = None,
    layer_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a heatmap of the effect of each window, concepts × window starts.

    Args:
        effects: The effects table, from `effect`. Positive means "carries the concept".
        axis: "layer" (what replacing the window takes away), "insert" (what it brings alone) or
            "content" (how much of what should stay is lost).
        carriers: Concept → `Window`, or one `Window` for a table of one concept; its cell is
            outlined and starred. None: no cell is.
        layer_names: Names for the ticks, in execution order; None: numbers.
        ax: Where to draw; None: a new figure.

    Returns:
        The axes that were drawn on.

    Raises:
        LocogenError: If the table has nothing along this axis, or a window twice.

    Example:
        >>> import pandas as pd
        >>> sizes = [{"position": 3, "estimate": 0.1}, {"position": 8, "estimate": 0.4}]
        >>> effects = pd.DataFrame(sizes).assign(concept="neon", axis="layer", low=0.0, high=0.5)
        >>> ax = plot_effect(effects, carriers=Window(8, 2))
        >>> ax.get_title(loc="left")
        '★ outlined: the carrier window'
    """
    matrix = effect_matrix(effects, axis=axis)
    label = _change_label(effects, axis)
    ax = _heatmap(matrix, label, ax, cmap="vlag", center=0, **_around_zero(matrix))
    cells = carrier_cells(effects, carriers, axis=axis)
    names = []
    notes = carrier_notes(effects, carriers, axis=axis)
    for concept in matrix.index:
        note = f"\n{notes[concept]}" if concept in notes else ""
        names.append(plain_label(concept) + note)
    _finish(ax, matrix, names, layer_names)
    for concept, start in cells.items():
        if start is not None and start in matrix.columns:
            _mark(ax, list(matrix.index).index(concept), list(matrix.columns).index(start))
    signs = []
    if any(start is not None for start in cells.values()):
        signs.append("★ outlined: the carrier window")
    if matrix.isna().to_numpy().any():
        # A cell without a number is not drawn, and shows what lies behind it.
        ax.patch.set(facecolor="0.95", edgecolor="0.75", hatch="////")
        signs.append("hatched: not measured")
    if signs:
        ax.set_title("; ".join(signs), loc="left", fontsize=9)
    return ax


def _around_zero(matrix: pd.DataFrame) -> dict[str, float]:
    """The ends of a color scale that holds zero and every value."""
    low = min(0.0, matrix.min().min())
    high = max(0.0, matrix.max().max())
    # A table of zeros needs some scale, too.
    return {"vmin": low, "vmax": high if high > low else 1.0}


def plot_timesteps(
    effects: pd.DataFrame,
    concept: str | None = None,
    *,
    layer_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw when the windows of one concept carry it: spans of steps × window starts.

    Args:
        effects: The effects table of a `localize` with `timesteps`. Positive means "carries the
            concept then". Steps count from 0, the noisiest.
        concept: Its name; None: the only one in the table.
        layer_names: Names for the ticks, in execution order; None: numbers.
        ax: Where to draw; None: a new figure.

    Returns:
        The axes that were drawn on.

    Raises:
        LocogenError: If the table has no timesteps, or not this concept.

    Example:
        >>> import pandas as pd
        >>> spans = pd.DataFrame({"first_timestep": [0, 6], "last_timestep": [5, 9]})
        >>> effects = spans.assign(concept="neon", axis="timesteps", position=3)
        >>> ax = plot_timesteps(effects.assign(estimate=[0.1, 0.4]))
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['steps 0-5', 'steps 6-9']
    """
    matrix = timesteps_matrix(effects, concept)
    ax = _heatmap(matrix, _change_label(effects), ax, cmap="vlag", center=0, **_around_zero(matrix))
    _finish(ax, matrix, list(matrix.index), layer_names)
    ax.set_ylabel("heard at")
    return ax


def plot_scores(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw a heatmap of the mean raw CLIP-score, concepts × window starts, on one scale.

    Args:
        table: The pictures table of `localize`; pictures of an edited model are left out.
        ax: Where to draw; None: a new figure.

    Returns:
        The axes that were drawn on; baseline, placebo and ceiling stand apart from the windows.

    Raises:
        LocogenError: If the table has no windows.

    Example:
        >>> import pandas as pd
        >>> rows = [("baseline", None, 0.6), ("window", 3, 0.5), ("window", 4, 0.2)]
        >>> table = pd.DataFrame(rows, columns=["role", "start", "clip_score"])
        >>> ax = plot_scores(table.assign(concept="neon"))
        >>> [text.get_text() for text in ax.get_xticklabels()]
        ['3', '4', '', 'baseline']
    """
    matrix = score_matrix(table)
    ax = _heatmap(matrix, SCORE_LABEL, ax, cmap="mako")
    _finish(ax, matrix, [plain_label(name) for name in matrix.index], None)
    return ax


def plot_curve(
    effects: pd.DataFrame, concept: str | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draw the effect by window start with 95 % intervals, for one concept.

    Args:
        effects: The effects table, from `effect`.
        concept: Its name; None: the only one in the table.
        ax: Where to draw; None: a new figure.

    Returns:
        The axes that were drawn on; ceiling and placebo are bands across.

    Raises:
        LocogenError: If the table does not have this concept, or has several and none is named.

    Example:
        >>> import pandas as pd
        >>> sizes = [{"position": 3, "estimate": 0.1}, {"position": 8, "estimate": 0.4}]
        >>> effects = pd.DataFrame(sizes).assign(concept="neon", axis="layer", low=0.0, high=0.5)
        >>> ax = plot_curve(effects)
        >>> ax.get_title(loc="left"), [text.get_text() for text in ax.get_legend().get_texts()]
        ('neon', ['window: what replacing it takes away'])
    """
    by_axis = curves(effects, concept)
    windows = by_axis.get("layer", [])
    inserts = by_axis.get("insert", [])
    width = 7.5 if len(windows) <= ANNOTATED_COLUMNS else 13.0
    ax = axes_for(ax, (width, 4.0))
    ax.axhline(0, color="0.35", linewidth=0.8)
    if windows:
        _series(ax, windows, -0.07, "window: what replacing it takes away", "o-", "#0173b2")
    if inserts:
        _series(ax, inserts, 0.07, "insert: what it brings alone", "s--", "#b35900")
    _bands(ax, by_axis)
    # Every layer has a tick where they fit, every fifth where they do not.
    starts = sorted({int(row["position"]) for row in [*windows, *inserts]})
    step = 1 if len(starts) <= ANNOTATED_COLUMNS else 5
    ax.set_xticks(starts[::step])
    ax.set_xlabel(START_LABEL)
    ax.set_ylabel(_change_label(effects))
    first_row = next(iter(by_axis.values()))[0]
    ax.set_title(plain_label(first_row["concept"], 60), loc="left", pad=24)
    # The legend stands between title and axes, so that it hides no point.
    corner = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderaxespad": 0.2}
    ax.legend(ncols=2, frameon=False, fontsize=9, **corner)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _bands(ax: Axes, by_axis: dict[str, list[dict[str, Any]]]) -> None:
    """Ceiling and placebo, those that there are; the higher one has its name above."""
    controls = [axis for axis in ("ceiling", "placebo") if axis in by_axis]
    controls.sort(key=lambda axis: by_axis[axis][0]["estimate"])
    for axis in controls:
        _band(ax, axis, by_axis[axis][0], above=axis == controls[-1])


def plot_strip(
    pictures: Sequence[Image.Image],
    labels: Sequence[str],
    *,
    columns: int | None = None,
    marked: Iterable[int] = (),
    zoom: float | None = None,
    fig: Figure | None = None,
) -> Figure:
    """Draw pictures in rows with a label under each.

    Small pictures are enlarged square by square, so that every pixel is seen as it is.

    Args:
        pictures: PIL pictures, all of one size.
        labels: One for each picture.
        columns: Pictures in a row; None: up to eight.
        marked: Indices of the pictures that are framed and starred.
        zoom: Pixels of the figure for one of the picture, at 100 per inch; None: pictures are 130
            wide.
        fig: Where to draw; None: a new figure.

    Returns:
        The figure that was drawn on.

    Raises:
        LocogenError: If there are no pictures, or another number of labels.

    Example:
        >>> from PIL import Image
        >>> pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        >>> figure = plot_strip(pictures, ["red", "blue"], marked=[1])
        >>> [cell.get_xlabel() for cell in figure.axes]
        ['red', '★ blue']
    """
    if len(pictures) != len(labels) or not pictures:
        raise LocogenError(
            f"{len(pictures)} pictures and {len(labels)} labels: "
            "give one label a picture, at least one"
        )
    columns = min(columns or 8, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    inches = width * (zoom or 130 / width) / 100  # of a picture's width
    # Some eleven letters of this size fit into an inch.
    texts = [plain_label(label, max(8, int(inches * 11))) for label in labels]
    if fig is None:
        fig = _strip_figure(texts, rows, columns, (inches, inches * height / width))
    framed = set(marked)
    for place, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        cell = fig.add_subplot(rows, columns, place + 1)
        _draw_cell(cell, picture, text, framed=place in framed)
    return fig


def _strip_figure(
    texts: Sequence[str], rows: int, columns: int, cell: tuple[float, float]
) -> Figure:
    """A figure with room for cells of this size (inches) and their labels."""
    import matplotlib.pyplot as plt

    # Labels may have several lines: all cells get room for the longest one.
    lines = max(text.count("\n") + 1 for text in texts)
    wide = columns * (cell[0] + 0.12) + 0.1
    high = rows * (cell[1] + 0.2 + 0.15 * lines) + 0.1
    return plt.figure(figsize=(wide, high), layout="constrained")


def _draw_cell(cell: Axes, picture: Image.Image, text: str, *, framed: bool) -> None:
    # matplotlib would smooth a small picture into a blur.
    small = max(picture.size) <= SMALL_PICTURE
    cell.imshow(picture, interpolation="nearest" if small else None)
    cell.set(xticks=[], yticks=[])
    label = f"★ {text}" if framed else text
    cell.set_xlabel(label, fontsize=8, labelpad=3, linespacing=1.1)
    for spine in cell.spines.values():
        spine.set(visible=framed, linewidth=3, edgecolor="black")


# Colors and marks differ both, for those who do not see the colors.
_MEASURES = {
    "efficacy": ("o", "#b2182b"),
    "generality": ("s", "#e08214"),
    "specificity": ("D", "#2166ac"),
    "ordinary": ("^", "#4d4d4d"),
    "chance": ("v", "#999999"),
    "name": ("P", "#d6604d"),
    "short": ("*", "#b35806"),
    "long": (">", "#8c510a"),
    "variant": ("<", "#bf812d"),
    "implicit": ("X", "#c51b7d"),
    "rest": ("p", "#1b7837"),
}
_ATTACKS = (("d", "#762a83"), ("h", "#9e57ab"), ("8", "#40004b"), ("H", "#5e4fa2"))  # in turn
_QUANTITIES = {
    "right": "share of pictures that show what the prompt says",
    "score": "mean CLIP-score (cosine)",
    "ssim": "likeness to the unedited picture (SSIM)",
    "distance": "distance of the scorer's features (1 - cosine)",
    "lpips": "perceptual distance (LPIPS)",
}


def plot_evaluation(
    summary: pd.DataFrame,
    *,
    quantity: str = "right",
    marked: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what each arm of an evaluation did: filled marks after, hollow ones before.

    One line an arm, one mark a measure. An arrow says where fewer right pictures are better (↓: of
    what should go), and where more (↑: of what should stay, or of a fact's new answer).

    Args:
        summary: From `locogen.editing.evaluation.summary`.
        quantity: "right", "score", "ssim", "distance" or "lpips".
        marked: The arm to point out with a star; None: none.
        ax: Where to draw; None: a new figure.

    Returns:
        The axes that were drawn on.

    Raises:
        LocogenError: If the table does not have this quantity.

    Example:
        >>> import pandas as pd
        >>> arm = {"quantity": "right", "arm": "layers 8-9", "measure": "efficacy", "before": 0.9}
        >>> arm |= {"after": 0.1, "after_low": 0.0, "after_high": 0.3}
        >>> ax = plot_evaluation(pd.DataFrame([arm]))
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['layers 8-9']
    """
    rows: Any = summary[summary["quantity"] == quantity]
    if rows.empty:
        quantities = ", ".join(dict.fromkeys(summary["quantity"]))
        raise LocogenError(f"the summary has no quantity {quantity!r}: it has {quantities}")
    arms = list(dict.fromkeys(rows["arm"]))
    measures = _in_order(rows["measure"])
    ax = axes_for(ax, (7.5, 1.4 + max(0.36, 0.12 * len(measures)) * len(arms)))
    step = min(0.22, 0.88 / len(measures))  # so that marks hide neither each other nor other arms'
    for place, measure in enumerate(measures):
        shift = step * (place - (len(measures) - 1) / 2)
        part = rows[rows["measure"] == measure]
        # What likeness is good depends on what should stay: no arrow for it.
        is_signed = quantity in ("right", "score") and "sign" in part
        label = measure_label(measure, part["sign"].iloc[0] if is_signed else 0)
        heights = [arms.index(arm) + shift for arm in part["arm"]]
        # Measures without a mark of their own, attacks, are the last.
        mark = _MEASURES.get(measure) or _ATTACKS[(len(measures) - place - 1) % len(_ATTACKS)]
        _draw_measure(ax, part, heights, mark, label)
    names = [f"{arm} ★" if arm == marked else arm for arm in arms]
    ax.set_yticks(range(len(arms)), [plain_label(name, 34) for name in names])
    ax.set_ylim(len(arms) - 0.5, -0.5)  # the first arm on top
    ax.set_xlabel(_QUANTITIES.get(quantity, quantity))
    ax.grid(axis="x", alpha=0.3)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    return ax


def _in_order(measures: Iterable[str]) -> list[str]:
    """Each measure once, in the order of their marks; those without a mark of their own last."""
    present = list(dict.fromkeys(measures))
    marked = [name for name in _MEASURES if name in present]
    return marked + [name for name in present if name not in _MEASURES]


def _draw_measure(
    ax: Axes, part: Any, heights: Sequence[float], mark: tuple[str, str], label: str
) -> None:
    """One measure of several arms, each at its height."""
    marker, color = mark
    after = part["after"].to_numpy(float)
    # Errorbars take distances, and none below zero; without an interval there is no bar.
    below = (after - part["after_low"]).clip(lower=0).fillna(0)
    above = (part["after_high"] - after).clip(lower=0).fillna(0)
    if part["before"].notna().any():
        hollow = {"mfc": "none", "mec": color, "alpha": 0.6, "markersize": 5}
        ax.plot(part["before"], heights, marker, **hollow)
    filled = {"fmt": marker, "color": color, "capsize": 2, "markersize": 5}
    ax.errorbar(after, heights, xerr=np.stack([below, above]), label=label, **filled)


def figure_size(matrix: pd.DataFrame) -> tuple[float, float]:
    """Inches for a heatmap of this shape, with its numbers, names and color bar."""
    rows, columns = matrix.shape
    cell = 0.5 if columns <= ANNOTATED_COLUMNS else 0.17  # inches; narrow ones hold no number
    return 2.4 + cell * columns, (1.3 if rows > 3 else 1.9) + 0.45 * rows


def plain_label(text: Any, width: int = 26) -> str:
    """A label as it is written: wrapped, cut after three lines; dollars start no formula."""
    lines = []
    for line in str(text).splitlines():
        lines += textwrap.wrap(line, width)
    if len(lines) > LABEL_LINES:
        last = lines[LABEL_LINES - 1][: width - 2] + " …"
        lines = [*lines[: LABEL_LINES - 1], last]
    return "\n".join(lines).replace("$", r"\$")


def axes_for(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def _heatmap(matrix: pd.DataFrame, label: str, ax: Axes | None, **colors: Any) -> Axes:
    ax = axes_for(ax, figure_size(matrix))
    return draw_heatmap(matrix, label, ax, **colors)


def draw_heatmap(matrix: pd.DataFrame, label: str, ax: Axes, **colors: Any) -> Axes:
    """One scale for all rows, no clipping of extremes; ticks and marks are drawn by the caller."""
    import seaborn as sns

    plain = {"robust": False, "linewidths": 0.5, "linecolor": "white"}
    no_ticks = {"xticklabels": False, "yticklabels": False}
    # `robust` would hide outliers: the largest effect is what is looked for.
    bar = _colorbar(matrix, label)
    numbers = _annotation(matrix)
    return sns.heatmap(matrix, ax=ax, cbar_kws=bar, **plain, **no_ticks, **colors, **numbers)


def _annotation(matrix: pd.DataFrame) -> dict[str, Any]:
    """Numbers in the cells, with as many digits as tell them apart, up to 20 columns."""
    if matrix.shape[1] > ANNOTATED_COLUMNS:
        return {}
    digits = precision(matrix.abs().max().max())
    texts = matrix.map(lambda value: number(value, digits))
    return {"annot": texts, "fmt": "", "annot_kws": {"size": 8}}


def _colorbar(matrix: pd.DataFrame, label: str) -> dict[str, Any]:
    """At the side of the heatmap, or below where that would be too short for its label."""
    if len(matrix) > 3:
        return {"label": label, "pad": 0.02, "aspect": 30}
    return {"label": label, "location": "bottom", "shrink": 0.5, "aspect": 40, "pad": 0.05}


def _finish(
    ax: Axes, matrix: pd.DataFrame, names: list[str], layer_names: Sequence[str] | None
) -> None:
    """Ticks and labels of a heatmap over window starts."""
    columns = list(matrix.columns)
    places = _tick_places(columns, layer_names)
    ticks = [_tick(columns[place], layer_names) for place in places]
    ax.set_xticks([place + 0.5 for place in places], ticks, rotation=0)
    angle = 40 if layer_names is None else 90
    for text in ax.get_xticklabels():
        if not text.get_text().isdigit():  # names do not fit side by side
            text.set(rotation=angle, ha="right", va="center", rotation_mode="anchor")
    ax.set_yticks([row + 0.5 for row in range(len(names))], names, rotation=0)
    ax.set_xlabel(START_LABEL)
    ax.set_ylabel("")
    ax.tick_params(length=0)


def _tick_places(columns: Sequence[Any], layer_names: Sequence[str] | None) -> list[int]:
    """Which columns get a tick: all; of many, every fifth layer and the controls."""
    if len(columns) <= ANNOTATED_COLUMNS or layer_names is not None:
        return list(range(len(columns)))
    places = []
    for place, column in enumerate(columns):
        if not isinstance(column, int) or column % 5 == 0:
            places.append(place)
    return places


def _tick(column: Any, layer_names: Sequence[str] | None) -> str:
    """The tick of one column: a number, a control's name, or a layer's name with its number."""
    if layer_names is None or not isinstance(column, int) or column >= len(layer_names):
        return str(column)
    return f"{layer_names[column]}  {column}".replace("$", r"\$")


def _mark(ax: Axes, row: int, column: int) -> None:
    """Outline one cell and put a star in its corner."""
    from matplotlib.patches import Rectangle

    # Not clipped: at the edge of the heatmap half of the line would be cut off.
    outline = {"fill": False, "edgecolor": "black", "linewidth": 2.2, "clip_on": False, "zorder": 5}
    ax.add_patch(Rectangle((column, row), 1, 1, **outline))
    draw_star(ax, row, column)


def draw_star(ax: Axes, row: int, column: int) -> None:
    """Put a star in the corner of one cell of a heatmap."""
    looks = {"markersize": 9, "color": "black", "markeredgecolor": "white", "mew": 0.6}
    ax.plot(column + 0.84, row + 0.22, "*", zorder=6, **looks)


def _series(
    ax: Axes, rows: list[dict[str, Any]], shift: float, label: str, style: str, color: str
) -> None:
    """Points with 95 % intervals, shifted so that two series do not hide each other."""
    # Intervals are drawn as distances from the points.
    places = [int(row["position"]) + shift for row in rows]
    values = [float(row["estimate"]) for row in rows]
    below = [_distance(row, "low") for row in rows]
    above = [_distance(row, "high") for row in rows]
    looks = {"fmt": style, "color": color, "capsize": 2.5, "markersize": 5}
    ax.errorbar(places, values, yerr=[below, above], label=label, **looks)


def _distance(row: dict[str, Any], end: str) -> float:
    """From the estimate to one end of its interval; 0 where there is none."""
    if missing(row[end]):
        return 0.0
    gap = float(row[end]) - float(row["estimate"])
    return max(0.0, gap if end == "high" else -gap)


def _band(ax: Axes, name: str, row: dict[str, Any], *, above: bool) -> None:
    """A horizontal band over the interval of a control, with its name at the right end."""
    color = {"ceiling": "#555555", "placebo": "#8a5a9e"}[name]
    # The line styles differ as well, for those who do not see the colors.
    estimate = float(row["estimate"])
    if not missing(row["low"]) and not missing(row["high"]):
        ax.axhspan(float(row["low"]), float(row["high"]), color=color, alpha=0.15, linewidth=0)
    ax.axhline(estimate, color=color, linestyle="-." if name == "ceiling" else ":", linewidth=1.4)
    end = ax.get_yaxis_transform()  # x as a share of the axes, y in data
    side = "bottom" if above else "top"
    ax.text(1.01, estimate, name, transform=end, color=color, va=side, fontsize=9)


def _change_label(effects: pd.DataFrame, axis: str = "layer") -> str:
    """What an effect above zero means: the score is lost with the window; for a fact, gained."""
    if axis == "content":
        return "content score lost (cosine)"
    used = {"clip_score"}
    if "score" in effects:
        used = set(effects["score"].dropna()) - {"content_score"}
    verb = "brought back" if axis == "insert" else _verb(effects)
    if len(used) > 1:
        return f"score {verb}"
    name, unit = SCORES.get(min(used, default=""), SCORES["clip_score"])
    return f"{name} {verb} ({unit})"


def _verb(effects: pd.DataFrame) -> str:
    kinds = set(effects["kind"].dropna()) if "kind" in effects else set()
    if kinds == {"fact"}:
        return "gained"
    return "lost, for facts gained" if "fact" in kinds else "lost"
