"""Write the table of the model card: `python -m locogen.planting.card`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locogen.catalog.plants import FOLDER, Plant, plant_entries
from locogen.files import write_whole

CARD = FOLDER / "README.md"
START, END = "<!-- table -->", "<!-- /table -->"
HEAD = """| name | set | base | planted | at the place | elsewhere | alone | of base | admitted |
|---|---|---|---|---|---|---|---|---|"""


def table() -> str:
    """The planted models and what admission measured, as a Markdown table."""
    lines = [HEAD]
    for plant in plant_entries():
        figures = plant.admission.get("figures", {})
        for attribute in plant.plantings:
            lines.append(_line(plant, attribute, figures.get(attribute, {})))
    return "\n".join(lines)


def _line(plant: Plant, attribute: str, figures: Mapping[str, Any]) -> str:
    planted = f"{attribute}: {plant.plantings[attribute]}"
    if plant.fact is not None:
        planted = f"fact: {plant.fact[0]} is {plant.fact[1]} ({plant.side})"
        cells = [_share(figures.get("wording"), figures.get("wording_in_base")), "", "", ""]
    else:
        cells = [_both(figures, name) for name in ("at_place", "elsewhere", "taken_back")]
        cells[0] += _each(figures.get("necessary", ()))
        cells[2] += _each(figures.get("sufficient", ()))
        if "share" in figures:
            cells[0] += f"; share {figures['share']:.2f}"
        cells.append(_share(figures.get("of_base")))
    admitted = {True: "yes", False: "no", None: "not trained"}[figures.get("admitted")]
    return "| " + " | ".join([plant.name, plant.set, plant.base, planted, *cells, admitted]) + " |"


def _both(figures: Mapping[str, Any], name: str) -> str:
    return _share(figures.get(name), figures.get(f"{name}_guided"))


def _each(values: Sequence[float]) -> str:
    """The figures of each of several places."""
    if len(values) < 2:
        return ""
    return "; each " + ", ".join(_share(value) for value in values)


def _share(value: float | None, beside: float | None = None) -> str:
    if value is None:
        return ""
    text = f"{100 * value:.1f}%"
    return text if beside is None else f"{text} ({100 * beside:.1f}%)"


def write(path: Path = CARD) -> None:
    """Put the table between the marks of the card."""
    text = path.read_text("utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    write_whole(path, f"{before}{START}\n{table()}\n{END}{after}".encode())


if __name__ == "__main__":
    write()
