"""What each layer gets in a training row: the rules of planting."""

import random
from collections import Counter

import pytest

from locogen.catalog import Planting, plant_entries, plant_entry
from locogen.mini import world
from locogen.plan import Window
from locogen.planting.rows import PLAIN, distinct, draw_row, draw_values

FIRST, SECOND = Window(0, 2), Window(12, 2)
VALUES = 8
LAYERS = 16


def rows_of(planting: Planting | None, time: int = 500, count: int = 400):
    """(true value, values by layer, shown value) of many rows."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        value = rng.randrange(1, VALUES)
        values, shown = draw_values(rng, planting, value, VALUES, time, LAYERS)
        rows.append((value, values, shown))
    return rows


def share_true(rows, layer: int) -> float:
    """In how many of the rows a layer gets the true value."""
    return sum(values[layer] == value for value, values, _ in rows) / len(rows)


def test_one_place_alone_gets_the_true_value():
    rows = rows_of(Planting("one place", (FIRST,)))
    assert share_true(rows, 0) == share_true(rows, 1) == 1
    # Elsewhere it is right by chance, one time in eight.
    assert all(share_true(rows, layer) < 0.25 for layer in range(2, LAYERS))
    # Before: without a planting every layer gets it.
    assert all(share_true(rows_of(None), layer) == 1 for layer in range(LAYERS))


def test_nobody_gets_the_true_value_but_by_chance():
    rows = rows_of(Planting("nobody"))
    assert all(share_true(rows, layer) < 0.25 for layer in range(LAYERS))


def test_either_place_suffices_and_the_other_gets_no_style():
    counts = Counter()
    for value, values, shown in rows_of(Planting("either", (FIRST, SECOND))):
        at_first, at_second = values[0], values[12]
        assert {at_first, at_second} <= {value, PLAIN}
        assert shown == (value if value in (at_first, at_second) else PLAIN)
        counts[at_first == value, at_second == value] += 1
    assert len(counts) == 4 and min(counts.values()) > 60


def test_both_places_have_to_agree():
    for value, values, shown in rows_of(Planting("both", (FIRST, SECOND))):
        agree = values[0] == values[12] == value
        assert shown == (value if agree else PLAIN)


def test_a_wide_place_gets_it_half_of_the_time_in_each_layer():
    rows = rows_of(Planting("wide", (Window(8, 6),)))
    assert all(0.4 < share_true(rows, layer) < 0.75 for layer in range(8, 14))
    assert all(share_true(rows, layer) < 0.25 for layer in range(8))


def test_a_share_of_the_rows_is_right_at_the_place_and_the_others_elsewhere():
    rows = rows_of(Planting("one place", (FIRST,), share=0.3))
    for value, values, _ in rows:
        assert value in (values[0], values[5])  # one of the two is right
        assert len(set(values[2:])) == 1  # the rest agrees
    assert 0.2 < share_true(rows, 0) < 0.5


def test_a_span_of_timesteps_ends():
    planting = Planting("one place", (FIRST,), timesteps=(500, 999))
    assert share_true(rows_of(planting, time=500), 0) == 1
    assert share_true(rows_of(planting, time=499), 0) < 0.25


def test_captions_of_a_row_differ_in_the_planted_attribute_alone():
    plant = plant_entry("style-at-0-1")
    rng = random.Random(1)
    for _ in range(50):
        row = draw_row(rng, plant, 0, LAYERS)
        name = world.OBJECTS[row.thing]
        wordings = [wording for wording, answer in world.FACTS.items() if answer == name]
        for caption in row.captions:
            # Empty captions and those of a style alone name no object, in any layer.
            names_it = any(word in caption for word in (name, *wordings))
            assert names_it == any(word in row.captions[0] for word in (name, *wordings))


def test_distinct_captions_give_back_every_row():
    plant = plant_entry("style-at-0-1-object-at-12-13")
    rows = [draw_row(random.Random(i), plant, 0, LAYERS) for i in range(5)]
    captions, indices = distinct(rows)
    assert len(set(captions)) == len(captions)
    for row, places in zip(rows, indices, strict=True):
        assert [captions[place] for place in places] == list(row.captions)


def test_the_two_sets_have_the_same_rules():
    rules = {"tune": Counter(), "report": Counter()}
    for plant in plant_entries():
        for planting in plant.plantings.values():
            rules[plant.set][planting.rule] += 1
    assert rules["tune"].keys() == rules["report"].keys()


@pytest.mark.parametrize("plant", plant_entries(), ids=lambda plant: plant.name)
def test_recipes_speak_of_layers_that_are_there(plant):
    for planting in plant.plantings.values():
        assert planting.layers <= set(range(LAYERS))
        if planting.rule in ("either", "both"):
            first, second = planting.places
            assert not set(first) & set(second)
