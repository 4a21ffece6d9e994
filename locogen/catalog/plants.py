"""Planted models by name: what was planted where, and how each was admitted.

A planted model is mini or mini-b, trained on until a concept is read at known layers only. The
recipes are in `locogen/planting/plants.toml`; what admission measured, in
`locogen/planting/admission.json`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from locogen.catalog.models import PLANTED, ModelEntry, model_entry, read_toml
from locogen.errors import LocogenError, unknown
from locogen.files import load_json
from locogen.plan import Window

if TYPE_CHECKING:
    from pandas import DataFrame

SETS = ("tune", "report")
FOLDER = Path(__file__).resolve().parent.parent / "planting"

# Rule of a planting → the kind of answer that is right for it.
ANSWERS: Mapping[str, str] = MappingProxyType(
    {
        "one place": "one place",
        "either": "each sufficient",
        "both": "each necessary",
        "wide": "spread",
        "nobody": "nobody",
        "side": "",
    }
)


@dataclass(frozen=True)
class Planting:
    """What one attribute of the pictures depends on in a planted model.

    Attributes:
        rule: "one place": only the place gets the true value in training. "either": each of two
            places suffices. "both": both places have to agree. "wide": each layer of the place gets
            the true value in half of the rows. "nobody": no layer gets it. "side": a
            fact that one side of the model was taught, all layers alike.
        places: The windows that the rule speaks of.
        share: Share of the training rows in which the place gets the true value; in the other rows,
            every layer but those of the place gets it.
        timesteps: Training timesteps, first and last, at which the place gets the true value; 999
            is pure noise. At others no layer gets it.
    """

    rule: str
    places: tuple[Window, ...] = ()
    share: float = 1.0
    timesteps: tuple[int, int] = (0, 999)

    @property
    def layers(self) -> frozenset[int]:
        """All layers of the places."""
        return frozenset(layer for place in self.places for layer in place)

    @property
    def answer(self) -> str:
        """The kind of answer that is right; "" where a share leaves it open."""
        return ANSWERS[self.rule] if self.share == 1.0 else ""

    def __str__(self) -> str:
        where = " and ".join(place.label for place in self.places) or "no layer"
        words = f"{self.rule}, {where}"
        if self.share != 1.0:
            words += f", share {self.share:g}"
        if self.timesteps != (0, 999):
            words += f", timesteps {self.timesteps[0]} to {self.timesteps[1]}"
        return words


@dataclass(frozen=True)
class Plant:
    """A planted model: its recipe, and what admission measured.

    Attributes:
        name: As `load` takes it, without "planted/".
        base: The model it was trained from, "mini" or "mini-b".
        set: "tune": for choosing methods and thresholds. "report": looked at once, for results.
        side: "denoiser": its cross-attention was trained. "text encoder": its text tower was.
        plantings: Attribute ("style", "object" or "fact") → what it depends on.
        concepts: Ids of the concepts of the planted attributes that the benchmark asks about.
        steps: Training steps.
        seed: Of the training.
        rate: Of the training, as a share of the base's own.
        fact: For facts: the wording and its answer.
        note: Anything worth knowing.
        admission: What was measured: figures by attribute, see `locogen.planting.admission`.
    """

    name: str
    base: str
    set: Literal["tune", "report"]
    side: Literal["denoiser", "text encoder"]
    plantings: Mapping[str, Planting] = field(hash=False)
    concepts: tuple[str, ...]
    steps: int
    seed: int
    rate: float = 0.5
    fact: tuple[str, str] | None = None
    note: str = ""
    admission: Mapping[str, Any] = field(
        default_factory=lambda: MappingProxyType({}), hash=False, repr=False
    )

    @property
    def weights(self) -> Path:
        """The file of the differences from its base."""
        return FOLDER / "weights" / f"{self.name}.safetensors"

    @property
    def layers(self) -> int:
        """How many layers it has: as many as its base."""
        layers = model_entry(self.base).layers
        assert layers is not None, "the mini models say how many"
        return layers

    @property
    def admitted(self) -> bool:
        """Whether training has planted what the recipe says."""
        return bool(self.admission.get("admitted"))


@functools.cache
def plant_entries() -> tuple[Plant, ...]:
    """Every planted model, in the order of the recipes."""
    recipes = read_toml(FOLDER / "plants.toml")
    admissions = load_json(FOLDER / "admission.json")
    return tuple(
        _plant(name, row, admissions.get(name, {})) for name, row in recipes["plants"].items()
    )


def _plant(name: str, row: Mapping[str, Any], admission: Mapping[str, Any]) -> Plant:
    plantings = {}
    for attribute in ("style", "object", "fact"):
        if attribute in row:
            values = dict(row[attribute])
            places = tuple(Window(start, width) for start, width in values.pop("places", ()))
            if "timesteps" in values:
                values["timesteps"] = tuple(values["timesteps"])
            plantings[attribute] = Planting(places=places, **values)
    fact = None
    if "wording" in row:
        fact = (row["wording"], row["answer"])
    return Plant(
        name=name,
        base=row["base"],
        set=row["set"],
        side=row.get("side", "denoiser"),
        plantings=MappingProxyType(plantings),
        concepts=tuple(row["concepts"]),
        steps=row["steps"],
        seed=row["seed"],
        rate=row.get("rate", 0.5),
        fact=fact,
        note=row.get("note", ""),
        admission=MappingProxyType(dict(admission)),
    )


def plant_entry(name: str) -> Plant:
    """One planted model by its name, with or without "planted/".

    Raises `LocogenError` with near matches for an unknown name.
    """
    entries = {entry.name: entry for entry in plant_entries()}
    bare = name.removeprefix(PLANTED)
    if bare not in entries:
        raise unknown("planted model", bare, entries)
    return entries[bare]


def planted_model(name: str) -> ModelEntry:
    """The catalog's entry of a planted model: that of its base, under its own name."""
    plant = plant_entry(name)
    full_name = PLANTED + plant.name
    base = model_entry(plant.base)
    return replace(base, name=full_name, id=full_name, note=plant.note)


def plants(set: str | None = None) -> DataFrame:
    """List the planted models: what is planted where, at which strength, how it was admitted.

    Each is mini or mini-b, trained on until the attribute is read as the rule says
    (`locogen/planting/README.md`). `load("planted/" + name)` gives its pipeline.

    Args:
        set: "tune" for the models that methods may be adjusted on, "report" for those that results
            are reported of; None: both.

    Returns:
        One row a model and planted attribute: name, set, base, side, attribute, rule, places,
        share, timesteps, the right kind of answer, whether it was `admitted`; of the rise of the
        training loss when all layers get a wrong value, the share `at_place` when the places alone
        get it, and the largest share `elsewhere`, of windows that touch no place; the same with
        guidance; and the concepts to ask about.

    Raises:
        LocogenError: For another set.

    Example:
        >>> table = plants("tune").set_index("name")
        >>> table.loc["style-at-0-1", ["base", "attribute", "rule", "places"]].to_list()
        ['mini-b', 'style', 'one place', '0-1']
    """
    import pandas as pd

    if set not in (None, *SETS):
        raise LocogenError(f"the set of plants is {set!r}: use 'tune', 'report', or None for both")
    rows = []
    for plant in plant_entries():
        if set in (None, plant.set):
            rows += [_line(plant, attribute) for attribute in plant.plantings]
    return pd.DataFrame(rows)


def _line(plant: Plant, attribute: str) -> dict[str, Any]:
    planting = plant.plantings[attribute]
    figures = plant.admission.get("figures", {}).get(attribute, {})
    line: dict[str, Any] = {"name": plant.name, "set": plant.set, "base": plant.base}
    line |= {"side": plant.side, "attribute": attribute, "rule": planting.rule}
    line["places"] = " and ".join(place.label for place in planting.places)
    line |= {"share": planting.share, "timesteps": planting.timesteps, "answer": planting.answer}
    line["admitted"] = plant.admitted
    for name in ("at_place", "elsewhere", "at_place_guided", "elsewhere_guided"):
        line[name] = figures.get(name)
    line["concepts"] = ", ".join(plant.concepts)
    return line
