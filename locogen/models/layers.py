"""Find the layers that hear text, in the order in which the denoiser runs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.models.families import Family, denoiser_of, family_of
from locogen.models.hooks import observed_calls
from locogen.models.offload import taken_back


@dataclass(frozen=True)
class Layer:
    """One layer that hears text: `index` counts in execution order from 0, `name` is its path in the denoiser.

    `joined`: it hears text and picture as one sequence, text first (FLUX's single blocks), and not apart.
    """

    index: int
    name: str
    module: Any = field(repr=False, compare=False)
    joined: bool = False


@dataclass(frozen=True, eq=False)
class _Remembered:
    """The layers of a denoiser, and the modules among which they were looked for, by name."""

    candidates: Mapping[str, Any]
    layers: tuple[Layer, ...]


_REMEMBERED: WeakKeyDictionary[Any, _Remembered] = WeakKeyDictionary()


def _hears_text(module: Any) -> bool:
    """Whether it has the matrices that read text: `to_k`, `to_v`, or joint attention's added pair."""
    has_keys_and_values = hasattr(module, "to_k") and hasattr(module, "to_v")
    return has_keys_and_values or hasattr(module, "add_k_proj")


def find_layers(model: Any) -> tuple[Layer, ...]:
    """The layers of a pipeline or denoiser that hear text, in observed execution order.

    By capability, not by class or name: modules with key and value matrices that a dry run calls with
    `encoder_hidden_states`, or the only ones of a block that is called so. The dry run is the smallest
    forward pass; it works on the meta device, and is repeated when a block was exchanged since.

    Args:
        model: A pipeline, or its denoiser; compiled or not.

    Returns:
        The layers, whose `index` is their place in this tuple.

    Raises:
        UnsupportedModel: The family is unknown.
        LocogenError: No layer hears text.
    """
    family = family_of(model)
    denoiser = denoiser_of(model, family)
    candidates = {name: part for name, part in denoiser.named_modules() if _hears_text(part)}
    remembered = _REMEMBERED.get(denoiser)
    if remembered is None or remembered.candidates != candidates:
        remembered = _Remembered(candidates, _observed_layers(denoiser, family, candidates))
        _REMEMBERED[denoiser] = remembered
    return remembered.layers


def _observed_layers(
    denoiser: Any, family: Family, candidates: Mapping[str, Any]
) -> tuple[Layer, ...]:
    names = {module: name for name, module in candidates.items()}
    blocks = {
        module: denoiser.get_submodule(name.rpartition(".")[0])
        for name, module in candidates.items()
    }
    with taken_back(denoiser):
        calls = observed_calls(
            denoiser,
            [*names, *blocks.values()],
            lambda: denoiser(**family.dummy_inputs(denoiser)),
        )
    with_text = {
        module
        for module, kwargs in calls.items()
        if kwargs.get("encoder_hidden_states") is not None
    }
    # Where no attention of a block is called with text, but the block is, its attention hears both.
    blocks_of_layers = {blocks[module] for module in names if module in with_text}
    joined = {
        module
        for module in names
        if blocks[module] in with_text and blocks[module] not in blocks_of_layers
    }
    in_order = [
        module for module in calls if module in names and (module in with_text or module in joined)
    ]
    if not in_order:
        raise LocogenError(
            f"no layer of {type(denoiser).__name__} was called with text: is it a text-to-image model?"
        )
    return tuple(
        Layer(index, names[module], module, module in joined)
        for index, module in enumerate(in_order)
    )


def select(layers: Sequence[Layer], indices: Iterable[int]) -> list[Layer]:
    """Some of a model's layers, in the order of the indices, none twice.

    Args:
        layers: All layers of the model, as from `find_layers`.
        indices: A window, or indices of single layers, counted from 0.

    Raises:
        LocogenError: There is no index, or the model does not have such a layer.
    """
    last = len(layers) - 1
    if isinstance(indices, str):
        raise LocogenError(f"layers is {indices!r}: give a window, or numbers from 0 to {last}")
    distinct = list(dict.fromkeys(int(index) for index in indices))
    if not distinct:
        raise LocogenError(f"there are no layers: give a window, or numbers from 0 to {last}")
    missing = [index for index in distinct if not 0 <= index <= last]
    if missing:
        raise LocogenError(f"layers {missing} are not there: the model has 0 to {last}")
    return [layers[index] for index in distinct]
