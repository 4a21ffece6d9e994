"""Models whose answer is known, and what is known of them: trained plants and deaf ones.

A deaf plant is not trained: the closed-form edit of a concept at every layer but a few. It is a
`Plant` of no steps, whose layers are those that go on hearing the concept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from locogen.catalog.concepts import concept as concept_of
from locogen.catalog.models import PLANTED
from locogen.catalog.plants import SETS, Plant, Planting, plant_entries
from locogen.editing.deafening import deafen
from locogen.errors import LocogenError, unknown
from locogen.models.load import load
from locogen.plan import Concept, Window, parse_names
from locogen.types import Pipeline

# As `locogen.planting.admission.UNREAD`: of the rise of the loss in the base, so much at most is
# left where nobody reads a concept.
UNREAD = 0.02


def _deaf(
    name: str, base: str, which: str, rule: str, places: tuple[Window, ...], *concepts: str
) -> Plant:
    return Plant(
        name=name,
        base=base,
        set=which,  # pyright: ignore[reportArgumentType]
        side="denoiser",
        plantings=MappingProxyType({"style": Planting(rule, places)}),
        concepts=concepts,
        steps=0,
        seed=0,
        note="not trained: a closed-form edit",
        admission=MappingProxyType({"admitted": True}),
    )


DEAF = (
    _deaf("deaf-in-mini", "mini", "tune", "nobody", (), "mini/neon", "mini/blueprint"),
    _deaf(
        *("deaf-but-12-13", "mini", "tune", "one place", (Window(12, 2),)),
        *("mini/neon", "mini/blueprint"),
    ),
    _deaf("deaf-in-mini-b", "mini-b", "report", "nobody", (), "mini/pop-art", "mini/stained-glass"),
    _deaf(
        *("deaf-but-12-14", "mini", "report", "one place", (Window(12, 3),)),
        *("mini/pop-art", "mini/stained-glass"),
    ),
)


@dataclass(frozen=True)
class Truth:
    """What is known of one attribute of a plant.

    Attributes:
        kind: The right kind of answer; "" where it is open.
        places: The planted places.
        strength: Share of the training rows in which the places got the true value.
        side: The side of the model that was taught a fact; "" for other attributes.
        scored: Whether answers are scored: the plant was admitted.
        note: Why not, or what is special.
    """

    kind: str
    places: tuple[Window, ...] = ()
    strength: float = 1.0
    side: str = ""
    scored: bool = True
    note: str = ""

    @property
    def layers(self) -> frozenset[int]:
        """All planted layers."""
        return frozenset(layer for place in self.places for layer in place)


def truth_of(plant: Plant, attribute: str) -> Truth:
    """What is known of an attribute, as admission has measured it.

    A plant that was not admitted says nothing, unless admission found that nobody reads the
    attribute any more: training has then made a "nobody" of it.
    """
    planting = plant.plantings[attribute]
    if attribute == "fact":
        admitted, note = _admitted(plant, attribute)
        return Truth("", side=plant.side, scored=admitted, note=note)
    figures = plant.admission.get("figures", {}).get(attribute, {})
    if planting.rule != "nobody" and figures.get("of_base", 1.0) <= UNREAD:
        return Truth("nobody", note="not learned: nobody reads it")
    admitted, note = _admitted(plant, attribute)
    return Truth(planting.answer, planting.places, planting.share, scored=admitted, note=note)


def _admitted(plant: Plant, attribute: str) -> tuple[bool, str]:
    if not plant.admission:
        return False, "not measured"
    figures = plant.admission.get("figures", {}).get(attribute, {})
    admitted = bool(figures.get("admitted", plant.admitted))
    return admitted, "" if admitted else "not admitted"


def plants_to_ask(choice: str | Sequence[str | Plant] | None) -> tuple[Plant, ...]:
    """The plants of a set ("tune", "report"), those of these names, or all; deaf ones included.

    Of a set and of all, those without weights are left out: `weightless` names them.
    """
    every = {plant.name: plant for plant in (*plant_entries(), *DEAF)}
    if isinstance(choice, str):
        choice = choice.strip()
    if choice is None or choice in SETS:
        return _of_set(choice, every.values())
    if isinstance(choice, str):
        # A set stands alone: among several names it is none of them.
        names = every if "," in choice else {*every, *SETS}
        choice = parse_names(choice.replace(PLANTED, ""), "plants", names)
    plants = tuple(_plant_of(entry, every) for entry in choice)
    if not plants:
        raise LocogenError("there are no plants: name some, or leave plants=None for all")
    return plants


def _of_set(choice: Any, plants: Iterable[Plant]) -> tuple[Plant, ...]:
    """The plants of a set that can be asked; None: of every set."""
    of_set = [plant for plant in plants if choice in (None, plant.set)]
    return tuple(plant for plant in of_set if is_deaf(plant) or plant.weights.exists())


def _plant_of(entry: str | Plant, every: Mapping[str, Plant]) -> Plant:
    """A plant by its name, with or without "planted/"; a plant is its own."""
    if isinstance(entry, Plant):
        return entry
    name = entry.removeprefix(PLANTED)
    if name not in every:
        raise unknown("planted model", name, {*every, *SETS})
    return every[name]


def weightless() -> tuple[str, ...]:
    """Names of the plants whose weights are not there: not trained, or not shipped."""
    return tuple(plant.name for plant in plant_entries() if not plant.weights.exists())


def ids_to_ask(plant: Plant, most: int | None) -> tuple[str, ...]:
    """Ids of the concepts to ask a plant about: of its planted attributes, at most so many."""
    ids = [id for id in plant.concepts if concept_of(id).kind in plant.plantings]
    return tuple(ids[:most])


def is_deaf(plant: Plant) -> bool:
    """Whether the plant is an edit of its base, which differs from concept to concept."""
    return plant.steps == 0


def load_plant(plant: Plant, device: str | None) -> Pipeline:
    """The pipeline of a plant; of a deaf one its base."""
    return load(plant.base if is_deaf(plant) else PLANTED + plant.name, device=device)


@contextmanager
def grown(plant: Plant, pipe: Pipeline, concept: Concept) -> Iterator[Pipeline]:
    """Within the context, the pipeline is as planted: a deaf plant's has its edit."""
    if not is_deaf(plant):
        yield pipe
        return
    hearing = plant.plantings[concept.kind].layers
    with deafen(pipe, concept, hearing=hearing).applied(pipe):
        yield pipe


def identity(plant: Plant) -> dict[str, Any]:
    """What makes a plant's model: answers about another one are not its own."""
    if is_deaf(plant):
        hearing = {name: sorted(one.layers) for name, one in plant.plantings.items()}
        return {"base": plant.base, "hearing": hearing}
    if not plant.weights.exists():
        raise LocogenError(
            f"the weights of {PLANTED}{plant.name} are not there ({plant.weights}): "
            "make them with `make planted`, or leave the plant out"
        )
    return {"weights": hashlib.sha256(plant.weights.read_bytes()).hexdigest()}
