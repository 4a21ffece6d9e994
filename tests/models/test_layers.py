"""Choosing layers by their index."""

import pytest

from locogen.errors import LocogenError
from locogen.models.layers import Layer, select
from locogen.plan import Window

LAYERS = [Layer(index, f"layer {index}", None) for index in range(4)]


def test_layers_come_in_the_order_of_their_indices_and_once() -> None:
    assert select(LAYERS, [3, 1, 3]) == [LAYERS[3], LAYERS[1]]
    assert select(LAYERS, Window(1, 2)) == LAYERS[1:3]


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        ([], "layers is empty: give a window, or numbers from 0 to 3"),
        ("12-13", "layers is '12-13'"),
        ([1, 4, -1], r"no layers \[4, -1\]: the model has layers 0 to 3"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(indices, says: str) -> None:
    with pytest.raises(LocogenError, match=says):
        select(LAYERS, indices)
