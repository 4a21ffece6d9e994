"""Which figures admit a plant, and what the shipped ones say."""

import pytest
import torch

from locogen.catalog import Planting, plant_entries, plants
from locogen.models.layers import find_layers
from locogen.models.load import load
from locogen.plan import Window
from locogen.planting.admission import Bench, Rises, is_admitted
from locogen.planting.card import CARD, table
from locogen.planting.hearing import texts_by_layer

FIRST, SECOND = Window(0, 2), Window(12, 2)
GOOD = {"of_base": 0.6, "at_place": 0.97, "elsewhere": 0.01, "taken_back": 0.98}
GOOD |= {"necessary": [0.97], "sufficient": [0.98], "largest_inside": 0.97}


def test_one_place_is_admitted_only_by_all_its_figures():
    planting = Planting("one place", (FIRST,))
    assert is_admitted(planting, GOOD)
    for name, value in [("at_place", 0.9), ("elsewhere", 0.03), ("of_base", 0.1)]:
        assert not is_admitted(planting, GOOD | {name: value})


def test_two_places_are_told_apart_by_what_each_does_alone():
    one_suffices = GOOD | {"necessary": [0.01, 0.02], "sufficient": [0.97, 0.96]}
    both_needed = GOOD | {"necessary": [0.97, 0.95], "sufficient": [0.01, 0.05]}
    either = Planting("either", (FIRST, SECOND))
    both = Planting("both", (FIRST, SECOND))
    assert is_admitted(either, one_suffices) and not is_admitted(either, both_needed)
    assert is_admitted(both, both_needed) and not is_admitted(both, one_suffices)


def test_nobody_is_admitted_when_the_rise_is_gone():
    assert is_admitted(Planting("nobody"), {"of_base": 0.01})
    assert not is_admitted(Planting("nobody"), {"of_base": 0.1})


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_share_is_read_from_squared_distances(share):
    figures = GOOD | {"at_place": share**2, "taken_back": 1 - (1 - share) ** 2}
    assert is_admitted(Planting("one place", (FIRST,), share=share), figures)
    assert not is_admitted(Planting("one place", (FIRST,), share=share - 0.2), figures)


def test_stored_verdicts_follow_from_the_stored_figures():
    for plant in plant_entries():
        if not plant.admission:
            continue
        for attribute, figures in plant.admission["figures"].items():
            if attribute != "fact":
                planting = plant.plantings[attribute]
                assert figures["admitted"] == is_admitted(planting, figures), plant.name


def test_the_card_shows_the_figures_as_they_are():
    assert table() in CARD.read_text("utf-8")


def test_the_table_has_a_line_for_each_planted_attribute():
    table = plants()
    assert len(table) == sum(len(plant.plantings) for plant in plant_entries())
    assert set(plants("tune")["name"]).isdisjoint(plants("report")["name"])


@pytest.fixture(scope="module")
def mini():
    return load("mini")


@torch.no_grad()
def test_each_layer_gets_its_text(mini):
    torch.manual_seed(0)
    layers = find_layers(mini)
    states = torch.randn(2, 20, 128)
    noisy, times = torch.randn(3, 16, 8, 8), torch.tensor([5, 500, 900])
    plain = [mini.unet(noisy, times, states[[i] * 3]).sample for i in (0, 1)]
    for i in (0, 1):
        with texts_by_layer(layers, states, torch.full((3, len(layers)), i)):
            output = mini.unet(noisy, times, states[[0] * 3]).sample
        assert torch.equal(output, plain[i])
    mixed = torch.zeros(3, len(layers), dtype=torch.long)
    mixed[:, 12] = 1
    with texts_by_layer(layers, states, mixed):
        output = mini.unet(noisy, times, states[[0] * 3]).sample
    assert not torch.equal(output, plain[0]) and not torch.equal(output, plain[1])
    # Afterwards nothing stays.
    assert torch.equal(mini.unet(noisy, times, states[[0] * 3]).sample, plain[0])


def test_rises_are_shares_of_the_whole(mini):
    torch.manual_seed(0)
    latents = torch.randn(48, 8, 1, 16, 8, 8)
    shown = [(i, 2) for i in range(4)]
    right = ["a picture of a cat in the style of neon"] * 4
    wrong = ["a picture of a cat"] * 4
    rises = Rises(Bench(mini, latents, right, wrong, shown, (500, 999)))
    assert rises.at(range(16)).tolist() == pytest.approx([1, 1])
    assert rises.at(()).tolist() == pytest.approx([0, 0])
    assert rises.taken_back(range(16)).tolist() == pytest.approx([1, 1])
