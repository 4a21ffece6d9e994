"""Maps of an attribution, layers × denoising steps and layers × words, as colored tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from locogen.markup import number
from locogen.pages.thumbnails import Scale, cell_styles

TITLES = {"step": "layers × denoising steps", "token": "layers × words"}
MOST_CELLS = 8000  # of one map


@dataclass(frozen=True)
class Map:
    """One map: a row for each step or word, a cell for each layer."""

    concept: str
    by: str
    """A key of `TITLES`."""
    layers: Sequence[int]
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    """Label, and for each layer its share in percent and its colors."""

    @property
    def title(self) -> str:
        """`neon: layers × words`."""
        return f"{self.concept}: {TITLES[self.by]}"


def maps_of(table: Any) -> list[Map]:
    """The maps of a table of shares.

    Args:
        table: The run's `shares.csv`: concept, by ("step" or "token"), label, layer, share.

    Raises:
        KeyError: The table has no such column, or, as `ValueError` and `TypeError`, wrong values.
    """
    table = table.assign(share=table["share"].astype(float), layer=table["layer"].astype(int))
    maps = []
    for concept, part in table.groupby("concept", sort=False):
        scale = Scale.of([part], ("share",))  # one for both maps of a concept
        for by in TITLES:
            rows = part[part["by"] == by]
            if 0 < len(rows) <= MOST_CELLS:
                maps.append(_map(str(concept), by, rows, scale))
    return maps


def _map(concept: str, by: str, rows: Any, scale: Scale) -> Map:
    layers = sorted(set(rows["layer"]))
    lines = []
    for label, line in rows.groupby("label", sort=False):
        shares = dict(zip(line["layer"], line["share"], strict=True))
        values = [shares.get(layer, float("nan")) for layer in layers]
        words = ["" if value != value else number(100 * value, 0) for value in values]
        styles = cell_styles(values, scale)
        lines.append((str(label), list(zip(words, styles, strict=True))))
    return Map(concept, by, layers, lines)
