"""Find the layers that hear text, in the order in which the denoiser runs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.families import Family, denoiser_of, family_of


@dataclass(frozen=True)
class Layer:
    """One cross-attention layer: `index` counts in execution order from 0, `name` is its path in the denoiser."""

    index: int
    name: str
    module: Any = field(repr=False, compare=False)


_FOUND: WeakKeyDictionary[Any, tuple[Layer, ...]] = WeakKeyDictionary()


def _hears_text(module: Any) -> bool:
    """Whether the module has the matrices that read text: `to_k`, `to_v`, or the added pair of joint attention."""
    return (hasattr(module, "to_k") and hasattr(module, "to_v")) or hasattr(module, "add_k_proj")


def find_layers(model: Any) -> tuple[Layer, ...]:
    """The cross-attention layers of a pipeline or denoiser, in observed execution order.

    By capability, not by class or name: modules with key and value matrices that a dry run calls with
    `encoder_hidden_states`. The dry run is the smallest forward pass; it works on the meta device. Raises
    `UnsupportedModel` for an unknown family, `LocogenError` if no layer hears text.
    """
    family = family_of(model)
    denoiser = denoiser_of(model, family)
    if denoiser not in _FOUND:
        _FOUND[denoiser] = _dry_run(denoiser, family)
    return _FOUND[denoiser]


def _dry_run(denoiser: Any, family: Family) -> tuple[Layer, ...]:
    import torch

    names = {module: name for name, module in denoiser.named_modules() if _hears_text(module)}
    called: list[Any] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("encoder_hidden_states") is not None and module not in called:
            called.append(module)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in names]
    try:
        with torch.no_grad():
            denoiser(**family.dummy_inputs(denoiser))
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise LocogenError(f"no layer of {type(denoiser).__name__} was called with text: is it a text-to-image model?")
    return tuple(Layer(index, names[module], module) for index, module in enumerate(called))
