"""The heatmap of `explore`: its windows can be pointed at, walked on by arrow keys, and chosen.

The browser's part is in `templates/heatmap.js`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import anywidget
import traitlets

from locogen.markup import number, precision
from locogen.plan import Window
from locogen.views.explorer import Explorer, Look
from locogen.views.tables import effect_matrix, missing

_TEMPLATES = files("locogen.views") / "templates"
_HINT = (
    "Point at a window, or walk with the arrow keys, to read its effect; a click or Enter shows "
    "its pictures."
)


class Heatmap(anywidget.AnyWidget):
    """One cell a window, one row a concept.

    Attributes:
        selected: The concept and the first layer of the window that is looked at; None: a window of
            another width.
        twin: What is saved with the notebook, as HTML; kept by the browser, too.
    """

    _esm = (_TEMPLATES / "heatmap.js").read_text(encoding="utf-8")
    _css = (_TEMPLATES / "heatmap.css").read_text(encoding="utf-8")

    rows = traitlets.List().tag(sync=True)
    selected: Any = traitlets.Tuple(allow_none=True, default_value=None).tag(sync=True)
    title = traitlets.Unicode("Effect of each window of layers").tag(sync=True)
    hint = traitlets.Unicode(_HINT).tag(sync=True)
    name = traitlets.Unicode().tag(sync=True)  # of the box, as its twin has it
    names = traitlets.Dict().tag(sync=True)  # of the sliders: description → handles and hint
    twin = traitlets.Unicode().tag(sync=True)

    def __init__(self, explorer: Explorer, name: str, names: Mapping[str, Any]) -> None:
        super().__init__(rows=heatmap_rows(explorer), name=name, names=dict(names))


def heatmap_rows(explorer: Explorer) -> list[dict[str, Any]]:
    """What the browser draws: for each concept its cells, with their colors and words."""
    matrix: Any = effect_matrix(explorer.effects)
    # One scale around zero for all concepts.
    largest = matrix.abs().max().max() or 1.0
    return [_row(explorer, concept, largest) for concept in explorer.concepts]


def _row(explorer: Explorer, concept: str, largest: float) -> dict[str, Any]:
    cells = explorer.cells(concept)
    # All cells of a row have as many digits as tell them apart.
    estimates = [cell["estimate"] for cell in cells.values()]
    digits = precision(*(value for value in estimates if not missing(value)))
    shown = []
    for start, cell in cells.items():
        look = Look(concept, "", start, start + explorer.width - 1, 0)
        star = " ★" if start == explorer.carriers[concept].start else ""
        is_measured = not missing(cell["estimate"])
        color, ink = _colors(cell["estimate"] / largest if is_measured else None)
        shown.append(
            {
                "start": start,
                "layers": Window(start, explorer.width).label + star,
                "effect": number(cell["estimate"], digits) if is_measured else "–",
                "words": explorer.finding(look),
                "color": color,
                "ink": ink,
            }
        )
    return {"concept": concept, "cells": shown}


def _colors(share: float | None) -> tuple[str, str]:
    """Of a cell, and of readable text on it; white where a window was not looked at."""
    import seaborn as sns
    from matplotlib.colors import to_hex

    if share is None:
        return "#ffffff", "#000"
    color = sns.color_palette("vlag", as_cmap=True)(0.5 + share / 2)
    # Dark text on light cells: luminance after Rec. 709.
    light = 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2] > 0.45
    return to_hex(color), "#000" if light else "#fff"
