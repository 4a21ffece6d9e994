"""Small pictures for the pages: heat strips, a curve with its intervals, pictures made small. Bytes come out.

All strips and curves of a page share one `Scale`: what looks alike is alike.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locogen.pages.html import check_size
from locogen.views.plots import plot_curve
from locogen.views.tables import missing

CELL, HEIGHT = 6, 12  # pixels of a strip's cell; the page stretches them
COLUMNS = ("estimate", "low", "high")


@dataclass(frozen=True)
class Scale:
    """The least and the largest value on a page, zero always among them."""

    low: float
    high: float

    @classmethod
    def of(cls, tables: Iterable[Any], columns: Sequence[str] = ("estimate",)) -> Scale:
        """The scale that holds these columns of all tables."""
        values = [
            float(value)
            for table in tables
            for name in columns
            if name in table
            for value in table[name].dropna()
        ]
        finite = [value for value in values if math.isfinite(value)]
        low, high = min([0.0, *finite]), max([0.0, *finite])
        return cls(low, high if high > low else low + 1.0)


def heat_strip(values: Iterable[Any], scale: Scale, *, marked: int | None = None) -> bytes:
    """One row of a heatmap as a PNG, a cell a value, `marked` outlined; `vlag` around zero, as in `plot_effect`."""
    import numpy as np
    import seaborn as sns
    from PIL import Image

    given = np.array([float("nan") if missing(value) else float(value) for value in values])
    limit = max(-scale.low, scale.high)
    colors = sns.color_palette("vlag", as_cmap=True)(0.5 + 0.5 * given / limit)  # (cells, RGBA)
    colors[np.isnan(given)] = (0.6, 0.6, 0.6, 1)
    pixels = np.repeat(
        np.repeat((colors[None, :, :3] * 255).round().astype("uint8"), CELL, 1), HEIGHT, 0
    )
    if marked is not None:
        cell = pixels[:, marked * CELL : (marked + 1) * CELL]
        cell[:2], cell[-2:], cell[:, :1], cell[:, -1:] = 0, 0, 0, 0
    Image.fromarray(pixels).quantize(256).save(data := io.BytesIO(), "PNG", optimize=True)
    return data.getvalue()


def small_picture(file: Path, size: int) -> bytes | None:
    """A picture at most `size` pixels wide and high, as WebP; None where it cannot be read."""
    from PIL import Image

    try:
        with file.open("rb") as stream:
            check_size(stream.read(24))
            with Image.open(stream, formats=["PNG"]) as opened:
                picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return None
    picture.thumbnail((size, size))
    picture.save(data := io.BytesIO(), "WEBP", quality=60)
    return data.getvalue()


def small_curve(effects: Any, concept: str, scale: Scale) -> bytes:
    """`plot_curve` small, for many beside each other: no title and legend, the page's own scale upwards."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        drawing = Figure(figsize=(3.8, 2.3), dpi=110)
        ax = plot_curve(
            effects, concept, ax=drawing.add_axes((0.16, 0.2, 0.67, 0.76))
        )  # alike in all, and quick
        if legend := ax.get_legend():
            legend.remove()
        margin = 0.04 * (scale.high - scale.low)
        ax.set(
            ylim=(scale.low - margin, scale.high + margin),
            xlabel="window start (layer)",
            ylabel="change of score",
        )
        ax.set_title("", loc="left")
        ax.tick_params(labelsize=8)
        drawing.savefig(png := io.BytesIO(), format="png")
    return png.getvalue()
