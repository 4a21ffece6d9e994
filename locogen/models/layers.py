"""Find the layers that read text, in the order in which the denoiser runs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.models.denoisers import FUSED
from locogen.models.families import Family, denoiser_of, family_of
from locogen.models.hooks import observed_calls
from locogen.models.offload import taken_back
from locogen.types import Module


@dataclass(frozen=True)
class Layer:
    """One layer of a denoiser that reads text.

    Attributes:
        index: Its place in execution order, counted from 0.
        name: Its path in the denoiser.
        module: The attention module itself.
        joined: Whether it reads text and picture as one sequence with the same matrices, as FLUX's
            single blocks do.

    Example:
        >>> layer = find_layers(load("mini"))[0]
        >>> (layer.index, layer.name, layer.joined)
        (0, 'down_blocks.0.attentions.0.transformer_blocks.0.attn2', False)
    """

    index: int
    name: str
    module: Module = field(repr=False, compare=False)
    joined: bool = False

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"layer {self.index} ({self.name})"


@dataclass(frozen=True, eq=False)
class _Remembered:
    """The layers of a denoiser, and the modules among which they were looked for, with names."""

    candidates: Mapping[Any, str]
    layers: tuple[Layer, ...]


_REMEMBERED: WeakKeyDictionary[Any, _Remembered] = WeakKeyDictionary()


def find_layers(model: Any) -> tuple[Layer, ...]:
    """Find the layers of a pipeline or denoiser that read text, in observed execution order.

    Args:
        model: A pipeline, or its denoiser; compiled or not.

    Returns:
        The layers, whose `index` is their place in this tuple.

    Raises:
        UnsupportedModel: The family is unknown.
        LocogenError: No layer reads text.

    Example:
        >>> layers = find_layers(load("mini"))
        >>> [layer.index for layer in layers] == list(range(len(layers)))
        True
    """
    # By capability and not by class or name: modules with matrices for keys and values that a dry
    # run calls with text. The order of `named_modules` is that of definition, which in U-Nets is
    # another one than that of execution (`mid_block` is defined last and runs in the middle).
    family = family_of(model)
    denoiser = denoiser_of(model, family)
    candidates = possible_layers(denoiser)

    # A block that was exchanged since brings other candidates: then they are observed anew.
    remembered = _REMEMBERED.get(denoiser)
    if remembered is None or remembered.candidates != candidates:
        remembered = _Remembered(candidates, _observed_layers(denoiser, family, candidates))
        _REMEMBERED[denoiser] = remembered
    return remembered.layers


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
        raise LocogenError(f"layers is empty: give a window, or numbers from 0 to {last}")
    missing = [index for index in distinct if not 0 <= index <= last]
    if missing:
        raise LocogenError(f"there are no layers {missing}: the model has layers 0 to {last}")
    return [layers[index] for index in distinct]


def possible_layers(denoiser: Module) -> dict[Any, str]:
    """The modules that may be layers, with their names in the denoiser: self-attention as well."""
    return {module: name for name, module in denoiser.named_modules() if _has_text_matrices(module)}


def _has_text_matrices(module: Module) -> bool:
    """Whether it has the matrices that read text: `to_k`, `to_v`, an added pair, or a fused one."""
    has_keys_and_values = hasattr(module, "to_k") and hasattr(module, "to_v")
    return has_keys_and_values or any(hasattr(module, name) for name in ("add_k_proj", FUSED))


def _observed_layers(
    denoiser: Module, family: Family, candidates: Mapping[Any, str]
) -> tuple[Layer, ...]:
    """Those of the candidates that the smallest forward pass calls with text."""
    inputs = family.dummy_inputs(denoiser)
    with taken_back(denoiser):
        calls = observed_calls(denoiser, candidates, lambda: denoiser(**inputs))
    joined_length = family.joined_length(inputs) if family.joined_length is not None else None

    layers: list[Layer] = []
    for module, arguments in calls.items():  # in execution order
        picture = arguments.get(family.layer_states)
        apart = gets_text(arguments.get(family.layer_text), picture)
        joined = not apart and _length(picture) == joined_length
        if apart or joined:
            layers.append(Layer(len(layers), candidates[module], module, joined))
    if not layers:
        raise LocogenError(
            f"no layer of {type(denoiser).__name__} was called with text: use the denoiser of a "
            "text-to-image model"
        )
    return tuple(layers)


def gets_text(text: Any, picture: Any) -> bool:
    """Whether a module is called with text beside the picture."""
    # Lumina's self-attention is handed its own input a second time, as if it were text.
    return text is not None and text is not picture


def _length(states: Any) -> int | None:
    """How many tokens a module gets as one sequence; None if it does not get a sequence."""
    is_sequence = getattr(states, "ndim", 0) == 3  # (rows, tokens, width)
    return states.shape[1] if is_sequence else None
