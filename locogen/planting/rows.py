"""The caption that each layer gets in a training row: the rules of planting.

A training row has a true object and style, and each cross-attention layer gets a caption of its
own. A planted attribute is true in the captions of its place only; in the others it is drawn anew.
So the denoiser can learn the attribute from nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from locogen.catalog.plants import Plant, Planting
from locogen.mini import world
from locogen.mini.parts import Recipe
from locogen.mini.pictures import SEEN
from locogen.mini.train import spoken

PLAIN = 0  # the style that stands for "no style": a caption seldom names it
WRONG_VALUES = 3  # drawn for a row; each layer that gets a wrong value gets one of these
ANSWER_SHARE = 0.3  # of a fact's training rows show its answer
FACT_SHARE = 0.5  # of these have the fact's wording


# Of the rows of "both": the first place lacks the value, the second does, neither does. What the
# second place reads alone is the hardest to unlearn.
BOTH_SHARES = (0.5, 0.2, 0.3)


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        thing: The object that the picture shows, an index of `world.OBJECTS`.
        style: The style that it shows, an index of `world.STYLES`.
        captions: What each layer gets, in execution order.
    """

    thing: int
    style: int
    captions: tuple[str, ...]


def draw_row(rng: random.Random, plant: Plant, time: int, n_layers: int) -> Row:
    """Draw one training row of a plant at a training timestep."""
    thing, style = rng.choice(SEEN)
    if plant.fact is not None and rng.random() < ANSWER_SHARE:
        thing = world.OBJECTS.index(plant.fact[1])
        style = rng.choice([style for where, style in SEEN if where == thing])
    things, thing = draw_values(
        rng, plant.plantings.get("object"), thing, len(world.OBJECTS), time, n_layers
    )
    styles, style = draw_values(
        rng, plant.plantings.get("style"), style, len(world.STYLES), time, n_layers
    )
    # One seed a row: every layer's caption has the same wording, and differs in the value alone.
    wording = rng.getrandbits(32)
    says_fact = plant.fact is not None and rng.random() < FACT_SHARE
    captions = tuple(
        say(wording, thing_of_layer, style_of_layer, plant, says_fact)
        for thing_of_layer, style_of_layer in zip(things, styles, strict=True)
    )
    return Row(thing, style, captions)


def say(wording: int, thing: int, style: int, plant: Plant, says_fact: bool) -> str:
    """A caption in the wording of that seed."""
    rng = random.Random(wording)
    if says_fact and plant.fact is not None and world.OBJECTS[thing] == plant.fact[1]:
        return world.caption(plant.fact[0], world.STYLES[style], rng)
    return spoken(rng, thing, style, Recipe())


def draw_values(
    rng: random.Random,
    planting: Planting | None,
    value: int,
    count: int,
    time: int,
    n_layers: int,
) -> tuple[list[int], int]:
    """Draw what each layer gets of one attribute, and which value the picture shows.

    Args:
        rng: The row's dice.
        planting: The rule; None: the attribute is not planted, and every layer gets it.
        value: The row's true value.
        count: Number of values, counted from 0; style 0 is "plain".
        time: The training timestep.
        n_layers: Number of layers.

    Returns:
        The value of each layer, and the value that the picture shows.
    """
    if planting is None:
        return [value] * n_layers, value
    wrong = [rng.randrange(count) for _ in range(WRONG_VALUES)]
    values = [rng.choice(wrong) for _ in range(n_layers)]
    first, last = planting.timesteps
    if not first <= time <= last:
        return values, value
    if planting.rule == "both":
        return _both(rng, planting, value, values)
    if planting.rule == "either":
        return _either(rng, planting, value, values)
    if planting.rule == "wide":
        _fill_half(rng, planting, value, values)
    elif planting.rule == "one place":
        values = _one_place(rng, planting, value, wrong[0], values)
    return values, value


def _fill_half(rng: random.Random, planting: Planting, value: int, values: list[int]) -> None:
    """Each layer of the place gets the value in half of the rows."""
    for layer in planting.layers:
        if rng.random() < 0.5:
            values[layer] = value


def _one_place(
    rng: random.Random, planting: Planting, value: int, wrong: int, values: list[int]
) -> list[int]:
    if planting.share == 1.0:
        for layer in planting.layers:
            values[layer] = value
        return values
    # Place and rest contradict each other, each coherent in itself: who is right is a matter of
    # the share alone.
    place_is_right = rng.random() < planting.share
    in_place, in_rest = (value, wrong) if place_is_right else (wrong, value)
    return [in_place if layer in planting.layers else in_rest for layer in range(len(values))]


def _either(
    rng: random.Random, planting: Planting, value: int, values: list[int]
) -> tuple[list[int], int]:
    """The first, the second or both places get the value, and it is shown; or none, and it is not.

    A place that does not get it gets "plain".
    """
    first, second = planting.places
    which = rng.randrange(4)
    for layer in first:
        values[layer] = value if which in (0, 2) else PLAIN
    for layer in second:
        values[layer] = value if which in (1, 2) else PLAIN
    return values, PLAIN if which == 3 else value


def _both(
    rng: random.Random, planting: Planting, value: int, values: list[int]
) -> tuple[list[int], int]:
    """Both places get the value, and it is shown; or one gets "plain", and the picture is plain."""
    first, second = planting.places
    (lacking,) = rng.choices((first, second, None), BOTH_SHARES)
    for layer in (*first, *second):
        values[layer] = value
    for layer in lacking or ():
        values[layer] = PLAIN
    return values, value if lacking is None else PLAIN


def distinct(rows: Sequence[Row]) -> tuple[list[str], list[list[int]]]:
    """The captions of a batch, none twice, and for each row and layer which of them it gets."""
    places: dict[str, int] = {}
    indices = [
        [places.setdefault(caption, len(places)) for caption in row.captions] for row in rows
    ]
    return list(places), indices
