"""Small pictures for the pages: heat strips, curves with their intervals, small copies. As bytes.

All strips and curves of a page share one `Scale`: equal values look equal.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locogen.pages.png import check_size, size_of
from locogen.views.plots import plot_curve
from locogen.views.tables import PROPOSING, missing

# Pixels of a strip's cell; the page stretches them.
CELL = 6
HEIGHT = 12


@dataclass(frozen=True)
class Scale:
    """The smallest and the largest value on a page, zero always among them."""

    low: float
    high: float

    @classmethod
    def of(cls, tables: Iterable[Any], columns: Sequence[str] = ("estimate",)) -> Scale:
        """The scale that holds these columns of all tables."""
        low = 0.0
        high = 0.0
        for table in tables:
            for name in columns:
                values = table[name].dropna() if name in table else ()
                finite = [float(value) for value in values if math.isfinite(value)]
                low = min([low, *finite])
                high = max([high, *finite])
        # All zeros: any scale will do that has a length.
        return cls(low, high if high > low else low + 1.0)


def heat_strip(values: Iterable[Any], scale: Scale, *, marked: int | None = None) -> bytes:
    """One row of a heatmap, in the colors of `plot_effect`.

    Args:
        values: One for each cell; missing ones are gray.
        scale: Which values have the strongest colors; zero is white.
        marked: The cell with an outline.

    Returns:
        A PNG.
    """
    from PIL import Image

    row = _colors(values, scale)[None]  # (1, cells, RGB)
    pixels = row.repeat(CELL, axis=1).repeat(HEIGHT, axis=0)  # (HEIGHT, cells * CELL, RGB)
    if marked is not None:
        cell = pixels[:, marked * CELL : (marked + 1) * CELL]  # (HEIGHT, CELL, RGB), a view
        cell[:2] = 0
        cell[-2:] = 0
        cell[:, :1] = 0
        cell[:, -1:] = 0

    png = io.BytesIO()
    Image.fromarray(pixels).quantize(256).save(png, "PNG", optimize=True)
    return png.getvalue()


def cell_styles(values: Iterable[Any], scale: Scale) -> list[str]:
    """The colors of `heat_strip` as CSS, each with the ink that is easier to read on it."""
    styles = []
    for red, green, blue in _colors(values, scale).tolist():
        # The luminance of WCAG 2: above 0.179 black has the higher contrast, below it white.
        parts = []
        for part in (red, green, blue):
            value = part / 255
            parts.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
        luminance = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
        ink = "#000000" if luminance > 0.179 else "#ffffff"
        styles.append(f"background: #{red:02x}{green:02x}{blue:02x}; color: {ink}")
    return styles


def _colors(values: Iterable[Any], scale: Scale) -> Any:
    """The colors of values, from 0 to 255: (cells, RGB); missing ones are gray."""
    import numpy as np
    import seaborn as sns

    numbers = [math.nan if missing(value) else float(value) for value in values]
    heights = np.array(numbers)  # (cells,)
    # Symmetric around zero, so that equal effects of both signs are equally strong.
    limit = max(-scale.low, scale.high)
    palette = sns.color_palette("vlag", as_cmap=True)
    colors = palette(0.5 + 0.5 * heights / limit)  # (cells, RGBA)
    colors[np.isnan(heights)] = (0.6, 0.6, 0.6, 1)
    return (colors[:, :3] * 255).round().astype("uint8")


def picture_size(file: Path) -> int:
    """The longer side of a PNG in pixels, from its first bytes; 0 if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return max(size_of(stream.read(24)))
    except OSError:
        return 0


def small_picture(file: Path, size: int) -> bytes | None:
    """A picture at most `size` pixels wide and high, as WebP; None if it cannot be read."""
    from PIL import Image

    try:
        with file.open("rb") as stream:
            check_size(stream.read(24))
            # Only PNG: Pillow opens dozens of formats, whose readers have faults of their own.
            with Image.open(stream, formats=["PNG"]) as original:
                picture = original.convert("RGB")
    except (OSError, ValueError, SyntaxError):  # Pillow raises SyntaxError for broken chunks
        return None
    picture.thumbnail((size, size))
    webp = io.BytesIO()
    picture.save(webp, "WEBP", quality=60)
    return webp.getvalue()


def small_curve(effects: Any, concept: str, scale: Scale) -> bytes:
    """`plot_curve` as a small PNG, without title and legend, on the page's scale."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        figure = Figure(figsize=(3.8, 2.3), dpi=110)
        # Fixed margins: curves next to each other line up, and nothing has to be laid out.
        ax = plot_curve(effects, concept, ax=figure.add_axes((0.16, 0.2, 0.67, 0.76)))
        legend = ax.get_legend()
        if legend is not None:
            legend.remove()
        is_fact = "kind" in effects and set(effects["kind"].dropna()) == {"fact"}
        what = "score gained" if is_fact else "score lost"
        if "method" in effects and set(effects["method"]) == {PROPOSING}:
            what = "share of what all layers do"
        margin = 0.04 * (scale.high - scale.low)
        ax.set(
            ylim=(scale.low - margin, scale.high + margin),
            xlabel="window start (layer)",
            ylabel=what,
        )
        ax.set_title("", loc="left")
        ax.tick_params(labelsize=8)
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()
