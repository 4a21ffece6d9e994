"""Find the layers that hear text, in the order in which the denoiser runs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.models.families import Family, denoiser_of, family_of
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


_FOUND: WeakKeyDictionary[Any, tuple[Layer, ...]] = WeakKeyDictionary()


def _hears_text(module: Any) -> bool:
    """Whether the module has the matrices that read text: `to_k`, `to_v`, or the added pair of joint attention."""
    return (hasattr(module, "to_k") and hasattr(module, "to_v")) or hasattr(module, "add_k_proj")


def find_layers(model: Any) -> tuple[Layer, ...]:
    """The layers of a pipeline or denoiser that hear text, in observed execution order.

    By capability, not by class or name: modules with key and value matrices that a dry run calls with
    `encoder_hidden_states`, or the only ones of a block that is called so. The dry run is the smallest forward pass;
    it works on the meta device. Raises `UnsupportedModel` for an unknown family, `LocogenError` if no layer hears text.
    """
    family = family_of(model)
    denoiser = denoiser_of(model, family)
    if denoiser not in _FOUND:
        _FOUND[denoiser] = _dry_run(denoiser, family)
    return _FOUND[denoiser]


def _dry_run(denoiser: Any, family: Family) -> tuple[Layer, ...]:
    import torch

    names = {module: name for name, module in denoiser.named_modules() if _hears_text(module)}
    blocks = {module: denoiser.get_submodule(name.rpartition(".")[0]) for module, name in names.items()}
    told: dict[Any, bool] = {}  # module: whether it was called with text, in the order of the calls

    def note(module: Any, args: Any, kwargs: Any) -> None:
        told.setdefault(module, kwargs.get("encoder_hidden_states") is not None)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in {*names, *blocks.values()}]
    try:
        with torch.no_grad(), taken_back(denoiser):
            denoiser(**family.dummy_inputs(denoiser))
    finally:
        for handle in handles:
            handle.remove()
    alone = {module for module in names if told.get(module)}
    settled = {blocks[module] for module in alone}
    joined = {module for module in names if told.get(blocks[module]) and blocks[module] not in settled}
    called = [module for module in told if module in alone | joined]
    if not called:
        raise LocogenError(f"no layer of {type(denoiser).__name__} was called with text: is it a text-to-image model?")
    return tuple(Layer(index, names[m], m, m in joined) for index, m in enumerate(called))
